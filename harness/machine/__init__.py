"""The machine a run is on: its devices, how processes are launched, which dtype, which signals."""
