"""The jobs, from settings to a finished folder."""
