"""`mirror tune`: measures a box, and writes into a bundle what suits it best."""
