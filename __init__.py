"""precast: language models as ahead-of-time compiled artifacts."""
