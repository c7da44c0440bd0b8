"""Whether a run fits a device, before it is started."""
