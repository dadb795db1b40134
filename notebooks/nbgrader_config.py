"""Settings for `nbgrader` when this folder is a course: `nbgrader generate_assignment` and `nbgrader autograde` read them."""

c = get_config()  # noqa: F821 (nbgrader puts it there)

c.CourseDirectory.course_id = "containers"
# The default stub is a line of Python, which is no Dockerfile instruction.
c.ClearSolutions.code_stub = {"python": "# YOUR CODE HERE"}
# Building an image and starting a machine may take longer than nbgrader's default of 30 s.
c.ExecutePreprocessor.timeout = 180
