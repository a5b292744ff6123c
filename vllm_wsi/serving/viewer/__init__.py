"""The viewer page and the routes that it asks."""
