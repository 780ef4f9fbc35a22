"""What others reached in Crafter: published agents and human experts."""

# Method, observation, LLM, env steps, score %, return, reward % of 22. "(S)": taken from another work's table.
PUBLISHED = (
    ("human expert (Hafner 2021)", "pixels", "", "", 50.5, 14.3, 65.0),
    ("ITC, token correspondence world model", "pixels", "", "1M", 35.6, 15.9, 72.5),
    ("TWM (Dedieu et al., v3)", "pixels", "", "1M", 31.8, 15.3, 69.7),
    ("TWM (Dedieu et al., v1)", "pixels", "", "1M", 27.9, 14.8, 67.4),
    ("TWM's model-free PPO (v1)", "pixels", "", "1M", 16.8, 12.2, 55.5),
    ("Achievement Distillation", "pixels", "", "1M", 21.8, 12.6, 57.3),
    ("PPO with a ResNet (Moon et al.)", "pixels", "", "1M", 15.6, 10.3, 46.9),
    ("DreamerV3", "pixels", "", "1M", 14.5, 11.7, 53.2),
    ("LSTM-SPCNN", "pixels", "", "1M", 12.1, None, None),
    ("GRU with transition prediction (I-yuki-0424)", "symbols", "", "1M", 18.5, None, None),
    ("DreamerV2", "pixels", "", "1M", 10.0, None, None),
    ("PPO (Stable-Baselines3)", "pixels", "", "1M", 4.6, None, None),
    ("Rainbow", "pixels", "", "1M", 4.3, None, None),
    ("RLAdapter / AdaRefiner (S)", "pixels, text", "GPT-4", "1M", 15.8, 12.3, 55.9),
    ("RLAdapter / AdaRefiner (S)", "pixels, text", "GPT-4", "5M", 28.2, 12.9, 58.6),
    ("RLAdapter / AdaRefiner (S)", "pixels, text", "GPT-3.5", "5M", 23.4, 11.8, None),
    ("DLLM", "pixels", "GPT-4", "1M", 26.4, 12.4, None),
    ("DLLM", "pixels", "GPT-4", "5M", 38.1, 15.4, None),
    ("Causal-aware LLMs", "pixels", "yes", "1M", 18.9, None, None),
    ("Causal-aware LLMs", "pixels", "yes", "5M", 33.6, None, None),
    ("Counterfactual Planning", "pixels", "72B", "1M", 20.4, None, None),
    ("Counterfactual Planning", "pixels", "72B", "5M", 36.1, None, None),
    ("EnvGen + Achievement Distillation (S)", "pixels", "4 calls", "1.96M", 35.3, 13.7, None),
    ("ELLM", "pixels", "yes", "5M", None, 6.0, None),
    ("SPRING, no training", "text", "GPT-4", "0", 27.3, 12.3, None),
    ("Reflexion", "text", "GPT-4", "0", 12.8, None, None),
    ("ReAct", "text", "GPT-4", "0", 8.3, None, None),
    ("plain GPT-4", "text", "GPT-4", "0", 3.4, None, None),
    ("random actions", "", "", "0", 1.6, 2.1, None),
)

# Success rates of human experts in % (Hafner 2021, arXiv 2109.06780).
HUMAN = {
    "collect_wood": 100, "collect_stone": 100, "place_table": 100, "make_wood_pickaxe": 100, "collect_drink": 92,
    "place_stone": 90, "eat_cow": 89, "collect_coal": 86, "defeat_zombie": 84, "make_stone_pickaxe": 78,
    "make_stone_sword": 78, "wake_up": 73, "collect_sapling": 67, "collect_iron": 53, "make_wood_sword": 45,
    "place_furnace": 32, "defeat_skeleton": 31, "make_iron_pickaxe": 26, "place_plant": 24, "make_iron_sword": 22,
    "collect_diamond": 12, "eat_plant": 8,
}  # fmt: skip
