"""From slide images to feature files."""
