"""LoRA through PEFT."""
