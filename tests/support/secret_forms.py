"""The forms in which secrets come along, with one that can be looked for byte by byte."""

from __future__ import annotations

import base64

SECRET = "PLANTEDs3cr3t"
BASIC = base64.b64encode(f"me:{SECRET}".encode()).decode()
FORMS = [
    f"https://me:{SECRET}@host.example.org/path@v2",
    f"https://me:p@{SECRET}@host.example.org",
    f"https://{SECRET}@host.example.org/x",
    f"https://{SECRET}:x-oauth-basic@host.example.org/x.git",
    f"postgresql://me:{SECRET}@db.example.org:5432/mlflow?sslmode=require",
    f"postgresql://me:a/{SECRET}@db.example.org/mlflow",
    f"mysql+pymysql://me:p%40{SECRET}@db.example.org/mlflow",
    f"mssql+pyodbc:///?odbc_connect=UID%3Dme%3BPWD%3D{SECRET}%3BDATABASE%3Dx",
    f"ftp://me:{SECRET}@host.example.org",
    f"me:{SECRET}@host.example.org",
    f"https%3A%2F%2Fme%3A{SECRET}%40host.example.org",
    f"https://host.example.org/?password={SECRET}&x=1",
    f"https://host.example.org/?x=1&token={SECRET}",
    f"https://host.example.org/?x=1&access_key={SECRET}",
    f"https://host.example.org/?key={SECRET}",
    f"https://b.s3.amazonaws.com/k?X-Amz-Credential={SECRET}%2F2026&X-Amz-Signature={SECRET}",
    f"https://b.s3.amazonaws.com/k?AWSAccessKeyId={SECRET}&Signature={SECRET}&Expires=1",
    f"https://storage.googleapis.com/b/k?GoogleAccessId={SECRET}&Signature={SECRET}",
    f"https://a.blob.core.windows.net/c/k?sv=2026&sig={SECRET}",
    f"Authorization: Bearer {SECRET}",
    f"Authorization: Basic {SECRET}==",
    f"Proxy-Authorization: {SECRET}",
    f"Bearer {SECRET}",
    f"X-Api-Key: {SECRET}",
    f"Cookie: session={SECRET}",
    f'{{"api_key": "{SECRET}"}}',
    f"MLFLOW_TRACKING_PASSWORD={SECRET}",
    f"AWS_SECRET_ACCESS_KEY={SECRET}",
    f"hf_{SECRET}AndTwentyMoreLetters",
]
