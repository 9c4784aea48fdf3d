"""Scripts on GLUE: the main job, and the study that compares methods."""
