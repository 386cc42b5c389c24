"""The interfaces that D-Bus itself defines, as introspection has them, and the signatures of their methods."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

EVERYWHERE = """ <interface name="org.freedesktop.DBus.Introspectable">
  <method name="Introspect"><arg name="xml_data" type="s" direction="out"/></method>
 </interface>
 <interface name="org.freedesktop.DBus.Peer">
  <method name="Ping"/>
  <method name="GetMachineId"><arg name="machine_uuid" type="s" direction="out"/></method>
 </interface>"""
PROPERTIES = """ <interface name="org.freedesktop.DBus.Properties">
  <method name="Get">
   <arg name="interface_name" type="s" direction="in"/><arg name="property_name" type="s" direction="in"/>
   <arg name="value" type="v" direction="out"/>
  </method>
  <method name="Set">
   <arg name="interface_name" type="s" direction="in"/><arg name="property_name" type="s" direction="in"/>
   <arg name="value" type="v" direction="in"/>
  </method>
  <method name="GetAll">
   <arg name="interface_name" type="s" direction="in"/><arg name="properties" type="a{sv}" direction="out"/>
  </method>
  <signal name="PropertiesChanged">
   <arg name="interface_name" type="s"/><arg name="changed_properties" type="a{sv}"/>
   <arg name="invalidated_properties" type="as"/>
  </signal>
 </interface>"""
OBJECT_MANAGER = """ <interface name="org.freedesktop.DBus.ObjectManager">
  <method name="GetManagedObjects"><arg name="objects" type="a{oa{sa{sv}}}" direction="out"/></method>
  <signal name="InterfacesAdded">
   <arg name="object_path" type="o"/><arg name="interfaces_and_properties" type="a{sa{sv}}"/>
  </signal>
  <signal name="InterfacesRemoved"><arg name="object_path" type="o"/><arg name="interfaces" type="as"/></signal>
 </interface>"""

METHODS = {
    ("org.freedesktop.DBus.Peer", "Ping"): "",
    ("org.freedesktop.DBus.Peer", "GetMachineId"): "",
    ("org.freedesktop.DBus.Introspectable", "Introspect"): "",
    ("org.freedesktop.DBus.ObjectManager", "GetManagedObjects"): "",
    ("org.freedesktop.DBus.Properties", "Get"): "ss",
    ("org.freedesktop.DBus.Properties", "Set"): "ssv",
    ("org.freedesktop.DBus.Properties", "GetAll"): "s",
}


def document(interfaces: Sequence[str], names: Sequence[str], *, manager: bool) -> str:
    """Introspection XML of an object: its own interfaces, the names of its children, and the standard interfaces."""
    lines = [
        '<!DOCTYPE node PUBLIC "-//freedesktop//DTD D-BUS Object Introspection 1.0//EN"',
        ' "http://www.freedesktop.org/standards/dbus/1.0/introspect.dtd">',
        "<node>",
        EVERYWHERE,
    ]
    if interfaces:
        lines.append(PROPERTIES)
    if manager:
        lines.append(OBJECT_MANAGER)
    lines += interfaces
    lines += [f' <node name="{name}"/>' for name in names]
    return "\n".join([*lines, "</node>", ""])


def children(path: str, objects: Iterable[str]) -> list[str]:
    """Names directly below `path`; compared by whole components, so /a/t is no parent of /a/tt."""
    prefix = "/" if path == "/" else path + "/"
    return sorted({each[len(prefix) :].partition("/")[0] for each in objects if each.startswith(prefix)})
