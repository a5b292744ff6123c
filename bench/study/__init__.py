"""The tables of the study, and the demo's recipe from several seeds."""
