"""DPG-Bench (ELLA, arXiv 2403.05135): dense prompts, judged question by question.

    graph = load_questions("official")                 # dpg_bench.dpg_benchmark; or "shapes"
    answerer = load_answerer("mplug", device="cuda")   # dpg_bench.answerers; or "shapes"
    answers = {item: answer_prompt(answerer, images[item], q) for item, q in graph.items.items()}
    scores = score(graph, answers)                     # dpg_bench.score: official and corrected
    print(format_scores(scores, "mplug"))

With images from a checkpoint or a folder, files, resume and a page of failures: dpg_bench/run.py.
"""
