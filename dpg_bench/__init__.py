"""DPG-Bench (ELLA, arXiv 2403.05135): long, detailed prompts, judged question by question.

    graph = load_questions("official")                 # dpg_bench.dpg_benchmark; or "shapes"
    answerer = load_answerer("mplug", device="cuda")   # dpg_bench.answerers; or "shapes"
    answers = {item: answer_prompt(answerer, images[item], q) for item, q in graph.items.items()}
    scores = score(graph, answers)                     # dpg_bench.score: official and corrected
    print(format_scores(scores, "mplug"))

dpg_bench/run.py draws the images of a checkpoint or judges a folder, writes result files and a page
of failures, and can resume.
"""
