"""e5core turns a decoder language model into a text-embedding model. Import from its rooms, one file each."""
