"""Fine-tuning on labels: an encoder with a light head, from distilled weights, pretrained ones, or none."""
