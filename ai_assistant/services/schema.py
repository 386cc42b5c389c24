"""The interfaces as their XML says: parsed once, served from, and compared with the code at start."""

from __future__ import annotations

import inspect
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from typing import Any

PREFIX = "org.ai_assistant1."
_DOC = "{http://www.freedesktop.org/dbus/1.0/doc.dtd}doc"


@dataclass(frozen=True, slots=True)
class Argument:
    name: str
    type: str
    text: str = ""


@dataclass(frozen=True, slots=True)
class Method:
    name: str
    inputs: tuple[Argument, ...]
    outputs: tuple[Argument, ...]
    text: str = ""

    @property
    def in_signature(self) -> str:
        return "".join(each.type for each in self.inputs)

    @property
    def out_signature(self) -> str:
        return "".join(each.type for each in self.outputs)

    @property
    def python_name(self) -> str:
        """``GetStatus`` is answered by ``get_status``."""
        return "".join("_" + each.lower() if each.isupper() else each for each in self.name).lstrip("_")


@dataclass(frozen=True, slots=True)
class Property:
    name: str
    type: str
    emits_change: bool = True
    text: str = ""


@dataclass(frozen=True, slots=True)
class Interface:
    """One interface; all properties are read-only, changes go through methods so that they can be authorised."""

    name: str
    methods: dict[str, Method]
    properties: dict[str, Property]
    text: str = ""

    def xml(self) -> str:
        """The introspection form, without the documentation."""
        # Imports an HTTP client, and few ever ask for this.
        from xml.sax.saxutils import quoteattr

        lines = [f" <interface name={quoteattr(self.name)}>"]
        for method in self.methods.values():
            lines.append(f"  <method name={quoteattr(method.name)}>")
            for direction, arguments in (("in", method.inputs), ("out", method.outputs)):
                for each in arguments:
                    what = f"name={quoteattr(each.name)} type={quoteattr(each.type)} direction={quoteattr(direction)}"
                    lines.append(f"   <arg {what}/>")
            lines.append("  </method>")
        for each_property in self.properties.values():
            lines.append(
                f'  <property name={quoteattr(each_property.name)} type={quoteattr(each_property.type)} access="read"'
            )
            if each_property.emits_change:
                lines[-1] += "/>"
            else:
                lines[-1] += '><annotation name="org.freedesktop.DBus.Property.EmitsChangedSignal" value="false"/>'
                lines.append("  </property>")
        lines.append(" </interface>")
        return "\n".join(lines)


def parse(text: str) -> Interface:
    """Parse one ``<node><interface>…`` document of ours; raises ValueError for what we do not use."""
    node = ElementTree.fromstring(text)  # noqa: S314 – a file of this package
    interface = node.find("interface")
    if interface is None:
        raise ValueError("no interface")
    methods: dict[str, Method] = {}
    properties: dict[str, Property] = {}
    for element in interface:
        name = element.get("name", "")
        if element.tag == "method":
            by_direction: dict[str, list[Argument]] = {"in": [], "out": []}
            for arg in element.findall("arg"):
                argument = Argument(arg.attrib["name"], arg.attrib["type"], _text(arg))
                by_direction[arg.attrib["direction"]].append(argument)
            methods[name] = Method(name, tuple(by_direction["in"]), tuple(by_direction["out"]), _text(element))
        elif element.tag == "property":
            if element.attrib["access"] != "read":
                raise ValueError(f"{name}: properties are read-only here")
            silent = any(
                each.get("name") == "org.freedesktop.DBus.Property.EmitsChangedSignal" and each.get("value") == "false"
                for each in element.findall("annotation")
            )
            properties[name] = Property(name, element.attrib["type"], not silent, _text(element))
        elif element.tag != _DOC:
            raise ValueError(f"unexpected element {element.tag}")
    return Interface(interface.attrib["name"], methods, properties, _text(interface))


def _text(element: ElementTree.Element) -> str:
    found = element.find(_DOC)
    return " ".join((found.text or "").split()) if found is not None else ""


def check(interface: Interface, handler: Any) -> None:
    """Raise TypeError unless `handler` answers exactly the methods of `interface`, with as many arguments."""
    for method in interface.methods.values():
        function = getattr(handler, method.python_name, None)
        if not inspect.iscoroutinefunction(function):
            raise TypeError(f"{type(handler).__name__} has no coroutine {method.python_name}")
        wanted = 1 + len(method.inputs)
        found = len(inspect.signature(function).parameters)
        if found != wanted:
            raise TypeError(f"{type(handler).__name__}.{method.python_name} takes {found} arguments, not {wanted}")
    known = {each.python_name for each in interface.methods.values()} | {"properties"}
    extra = {
        name for name, value in vars(type(handler)).items() if not name.startswith("_") and inspect.isfunction(value)
    } - known
    if extra:
        raise TypeError(f"{type(handler).__name__}: not in the XML: {', '.join(sorted(extra))}")
