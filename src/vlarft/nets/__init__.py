"""Networks without a task: blocks that the tokenizer, the world model and the policy are built from."""
