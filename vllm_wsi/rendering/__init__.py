"""Pictures and GeoJSON of what was selected, and where it lies on the slide."""
