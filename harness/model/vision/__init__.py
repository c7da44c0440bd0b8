"""The frozen image encoder: tower.py what it is, load.py which kinds there are."""
