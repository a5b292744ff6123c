"""Question files about slides."""
