# The viewer for a clinic's server. Build, then run with the folder of results; the token is printed on start:
#   docker build -t explainable-mri .
#   docker run --rm -p 8866:8866 -v /path/to/results:/results:ro explainable-mri
# Test scans of an experiment are shown where their files can be read too; the paths in its tables begin at /home/viewer:
#   docker run --rm -p 8866:8866 -v /path/to/results:/results:ro -v /path/to/data:/home/viewer/data:ro explainable-mri
FROM python:3.12-slim
RUN apt-get update && apt-get install -y --no-install-recommends libpango-1.0-0 libpangoft2-1.0-0 && rm -rf /var/lib/apt/lists/*
WORKDIR /app
COPY . .
RUN pip install --no-cache-dir --extra-index-url https://download.pytorch.org/whl/cpu -c constraints.txt '.[viewer,report,preprocess]'
RUN useradd --create-home viewer
USER viewer
WORKDIR /home/viewer
EXPOSE 8866
CMD ["explainable-mri", "app", "/results", "--host", "0.0.0.0"]
