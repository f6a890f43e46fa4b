"""Parts of tools/bench_awq.py: texts, the procedure of llm-awq, the peers, and what one method's process does."""
