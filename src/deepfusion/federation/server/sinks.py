"""An object store that takes the bytes of uploads in place of the gateway; the gateway fetches and verifies them."""

from __future__ import annotations

import math
import threading
from pathlib import Path
from typing import Any

from deepfusion.errors import InputError
from deepfusion.federation.offer import Offer, OfferedFile
from deepfusion.sections import S3Section

URL_SECONDS = 3600
_PARTS_AT_ONCE = 8  # few enough for a slow device to send them while the addresses are good
_MAX_PARTS = 10_000  # of S3
_BLOCK_BYTES = 2**20


class S3Sink:
    """Multipart uploads by addresses that are signed beforehand, so that devices need no credentials of the store.

    What is there is asked of the store each time, so nothing is lost with the process. An upload of another part
    size is no trouble: parts of a wrong size count as missing.

    Args:
        config: bucket, prefix and where the store is.
        run: name of the run, a part of all names.

    Attributes:
        errors: what every method raises when the store cannot be reached or refuses.

    Raises:
        InputError: boto3 is not installed, no bucket is named, or it cannot be reached.
    """

    def __init__(self, config: S3Section, run: str) -> None:
        try:
            import boto3
            import botocore.exceptions
            from botocore.config import Config as Settings
        except ImportError:
            raise InputError(
                "federation.sink s3 needs boto3", fix="pip install deepfusion[s3]", code="no-s3"
            ) from None
        if not config.bucket:
            raise InputError("no bucket is named", where="federation.s3.bucket", code="no-s3")
        self.bucket, self.prefix, self.part_bytes = config.bucket, f"{config.prefix}/{run}", config.part_bytes
        self.errors = (botocore.exceptions.ClientError, botocore.exceptions.BotoCoreError)
        self._seen: dict[str, int] = {}
        self._starting = threading.Lock()
        settings = Settings(
            signature_version="s3v4",
            connect_timeout=10,
            retries={"total_max_attempts": 2},  # devices are patient and ask again
            s3={
                "addressing_style": "path" if config.endpoint else "auto"
            },  # stores of one's own seldom have names per bucket
            request_checksum_calculation="when_required",  # other stores than that of AWS refuse the newer checksums
            response_checksum_validation="when_required",
        )
        try:
            self._client = boto3.client(
                "s3", endpoint_url=config.endpoint, region_name=config.region, config=settings
            )
            self._client.head_bucket(Bucket=self.bucket)
        except self.errors as error:
            fix = "check federation.s3 and the credentials in the environment"
            raise InputError(str(error)[:200], where=f"bucket {self.bucket}", fix=fix, code="no-s3") from None

    def parts(self, device: str, offer: Offer, file: OfferedFile) -> dict[str, Any]:
        """What of a file is to be sent next.

        Returns:
            part_bytes, and parts: some of those missing, each with number, offset and size in bytes, and url to
            PUT it to. No parts: all are there.
        """
        key = self._key(device, offer, file)
        size = self._part_size(file)
        if self._object_size(key) == file.size:
            self._seen[key] = file.size
            return {"part_bytes": size, "parts": []}
        with self._starting:
            upload, here = self._begun(key, file)
            upload = upload or self._client.create_multipart_upload(Bucket=self.bucket, Key=key)["UploadId"]
        self._seen[key] = sum(part["Size"] for part in here)
        there = {part["PartNumber"] for part in here}
        wanted = [number for number in range(1, math.ceil(file.size / size) + 1) if number not in there]
        parts = [self._part(key, upload, file, number) for number in wanted[:_PARTS_AT_ONCE]]
        return {"part_bytes": size, "parts": parts}

    def held(self, device: str, offer: Offer) -> dict[str, int]:
        """Bytes of the files of an upload that are in the store."""
        held = {}
        for file in offer.files:
            key = self._key(device, offer, file)
            if key not in self._seen and file.size:
                whole = self._object_size(key) == file.size
                self._seen[key] = (
                    file.size if whole else sum(part["Size"] for part in self._begun(key, file)[1])
                )
            held[file.name] = self._seen.get(key, 0)
        return held

    def collect(self, device: str, offer: Offer, folder: Path) -> None:
        """Put together what is whole in the store and bring it to `folder`, going on where an earlier attempt ended."""
        for file in offer.files:
            key, path = self._key(device, offer, file), folder / file.name
            begun = path.stat().st_size if path.exists() else 0
            if begun < file.size and self._complete(key, file):
                body = self._client.get_object(Bucket=self.bucket, Key=key, Range=f"bytes={begun}-")["Body"]
                with open(path, "ab") as out:
                    for block in body.iter_chunks(_BLOCK_BYTES):
                        out.write(block)

    def remove(self, device: str, offer: Offer, name: str) -> None:
        """Remove one file, so that it is sent again."""
        key = next(self._key(device, offer, file) for file in offer.files if file.name == name)
        self._client.delete_object(Bucket=self.bucket, Key=key)
        self._seen.pop(key, None)

    def forget(self, device: str, keep: Offer | None = None) -> None:
        """Remove all that a device has in the store, but for one offer."""
        prefix = f"{self.prefix}/{device}/"
        kept = f"{prefix}{keep.digest[:16]}/" if keep else None
        for upload in self._uploads(prefix):
            if kept is None or not upload["Key"].startswith(kept):
                self._client.abort_multipart_upload(
                    Bucket=self.bucket, Key=upload["Key"], UploadId=upload["UploadId"]
                )
        for page in self._client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=prefix):
            for found in page.get("Contents", []):
                if kept is None or not found["Key"].startswith(kept):
                    self._client.delete_object(Bucket=self.bucket, Key=found["Key"])
        for key in [
            key for key in self._seen if key.startswith(prefix) and not (kept and key.startswith(kept))
        ]:
            del self._seen[key]

    def _key(self, device: str, offer: Offer, file: OfferedFile) -> str:
        return f"{self.prefix}/{device}/{offer.digest[:16]}/{file.name}"

    def _part_size(self, file: OfferedFile) -> int:
        return max(self.part_bytes, math.ceil(file.size / _MAX_PARTS))

    def _part(self, key: str, upload: str, file: OfferedFile, number: int) -> dict[str, Any]:
        offset = (number - 1) * self._part_size(file)
        size = min(self._part_size(file), file.size - offset)
        # The size is signed too: the address is good for nothing larger.
        wanted = {
            "Bucket": self.bucket, "Key": key, "UploadId": upload, "PartNumber": number, "ContentLength": size
        }  # fmt: skip
        url = self._client.generate_presigned_url("upload_part", Params=wanted, ExpiresIn=URL_SECONDS)
        return {"number": number, "offset": offset, "size": size, "url": url}

    def _uploads(self, prefix: str) -> list[dict[str, Any]]:
        """Multipart uploads that have begun, the oldest first."""
        pages = self._client.get_paginator("list_multipart_uploads").paginate(
            Bucket=self.bucket, Prefix=prefix
        )
        found = [upload for page in pages for upload in page.get("Uploads", [])]
        return sorted(found, key=lambda upload: (upload["Initiated"], upload["UploadId"]))

    def _begun(self, key: str, file: OfferedFile) -> tuple[str, list[dict[str, Any]]]:
        """The multipart upload of a file ("": none) and its parts that are sound."""
        name = next((upload["UploadId"] for upload in self._uploads(key) if upload["Key"] == key), "")
        if not name:
            return "", []
        pages = self._client.get_paginator("list_parts").paginate(Bucket=self.bucket, Key=key, UploadId=name)
        size = self._part_size(file)
        expected = {
            number + 1: min(size, file.size - number * size) for number in range(math.ceil(file.size / size))
        }
        parts = [part for page in pages for part in page.get("Parts", [])]
        return name, [part for part in parts if expected.get(part["PartNumber"]) == part["Size"]]

    def _object_size(self, key: str) -> int | None:
        try:
            return int(self._client.head_object(Bucket=self.bucket, Key=key)["ContentLength"])
        except self._client.exceptions.ClientError as error:
            if error.response["ResponseMetadata"]["HTTPStatusCode"] != 404:
                raise
            return None

    def _complete(self, key: str, file: OfferedFile) -> bool:
        """Whether all of a file is in the store, as one object from now on."""
        if self._object_size(key) == file.size:
            return True
        upload, parts = self._begun(key, file)
        if not parts or sum(part["Size"] for part in parts) < file.size:
            return False
        listed = [{"PartNumber": part["PartNumber"], "ETag": part["ETag"]} for part in parts]
        self._client.complete_multipart_upload(
            Bucket=self.bucket, Key=key, UploadId=upload, MultipartUpload={"Parts": listed}
        )
        return True
