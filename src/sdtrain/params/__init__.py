"""`params.yaml`: its fields, what they must fulfil together, and what they ask of the machine."""
