"""The tests of the requirement documents, with their names, on gloo and the CPU."""
