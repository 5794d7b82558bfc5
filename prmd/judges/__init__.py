"""Who judges responses: reward models, classifiers, text judges with their rubrics and chat clients, toxicity scorers."""
