"""`qtune eval`: metrics over prompts and answers, texts generated in batches, and the tasks of lm-eval's harness."""
