"""`mirror compile`: a bundle's draft, compiled ahead of time for one device."""
