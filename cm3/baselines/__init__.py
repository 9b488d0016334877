"""Models to compare CM3 with, from most popular items to multimodal graph networks, behind one interface."""
