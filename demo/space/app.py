"""The Space: the page of the embedded checkpoint."""

from phantomgrad_demo import build_app

if __name__ == "__main__":
    build_app("embedded").launch()
