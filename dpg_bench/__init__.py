"""DPG-Bench (ELLA, arXiv 2403.05135): dense prompts, judged question by question.

graph = load_questions("official")             # dpg_bench.dpg_benchmark; or "shapes"
judge = load_judge("mplug", device="cuda")     # dpg_bench.judges; or "shapes"
answers = {item: answer_prompt(judge, images[item], rows) for item, rows in graph.items.items()}
report = score(graph, answers)                 # dpg_bench.score: official and corrected
print(format_report(report, "mplug"))

With images from a checkpoint or a folder, files, resume and a page of failures: dpg_bench/run.py.
"""
