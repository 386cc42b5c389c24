"""The interfaces that D-Bus itself defines, as introspection has them, and the signatures of their methods."""

from __future__ import annotations

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
