"""The tests that the requirement documents ask for, by their names, on gloo and the CPU."""
