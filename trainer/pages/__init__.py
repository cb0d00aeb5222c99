"""HTML pages: one file each, without network, for a light and a dark screen and for print."""
