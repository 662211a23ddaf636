"""Measuring protocols behind `flashmoe bench`; they return numbers and print nothing."""
