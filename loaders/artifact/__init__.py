"""The contract between exporter and loader: manifest, weight store, hashes, compatibility."""
