"""Fine-tuning with DeepSpeed: configuration, data, engine, validation, logging, resume."""
