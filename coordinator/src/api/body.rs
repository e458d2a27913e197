//! The body of a POST request: its content type, its size and its JSON, checked before anything looks at the fields.

use super::{
    error::{ApiError, shown},
    fields::Fields,
    json,
};
use axum::{
    body::Body,
    extract::{FromRequest, Request},
    http::{HeaderMap, header},
};
use bytes::Bytes;
use futures_util::StreamExt;
use std::time::Duration;
use tokio::{task::spawn_blocking, time::timeout};

pub(super) const BODY_BYTES_MAX: usize = 16 << 20;

/// Larger bodies are parsed away from the threads that serve connections.
const PARSED_AT_ONCE_BYTES_MAX: usize = 256 << 10;

/// For the whole body.
const BODY_TIMEOUT: Duration = Duration::from_secs(60);

/// What is read and thrown away of a body that is too large: clients that write everything before they read would not see the answer
/// of a server that stops reading.
const DISCARDED_BYTES_MAX: u64 = 1 << 30;
const DISCARD_TIMEOUT: Duration = Duration::from_secs(10);

/// The fields of a JSON body.
pub(super) struct JsonBody(pub(super) Fields);

impl<S: Sync> FromRequest<S> for JsonBody {
    type Rejection = ApiError;

    async fn from_request(request: Request, _: &S) -> Result<Self, ApiError> {
        check_content_type(request.headers())?;
        let bytes = read(request).await?;
        let value = if bytes.len() <= PARSED_AT_ONCE_BYTES_MAX {
            json::parse(&bytes)?
        } else {
            let parsed = spawn_blocking(move || json::parse(&bytes)).await;
            parsed.unwrap_or_else(|error| Err(ApiError::BodyBroken { message: error.to_string() }))?
        };
        Ok(Self(Fields::of_body(value)?))
    }
}

/// A body without content type is taken as JSON; web pages cannot send one here, because the Origin header gives them away.
fn check_content_type(headers: &HeaderMap) -> Result<(), ApiError> {
    let Some(value) = headers.get(header::CONTENT_TYPE) else { return Ok(()) };
    let text = String::from_utf8_lossy(value.as_bytes());
    let essence = text.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    if essence == "application/json" {
        return Ok(());
    }
    Err(ApiError::ContentType { found: shown(&text) })
}

async fn read(request: Request) -> Result<Bytes, ApiError> {
    let too_large = ApiError::BodyTooLarge { max_bytes: BODY_BYTES_MAX };
    let (parts, body) = request.into_parts();
    let announced = parts.headers.get(header::CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse::<u64>().ok());
    if announced.is_some_and(|bytes| bytes > BODY_BYTES_MAX as u64) {
        // A client that asks before it sends gets its answer instead of a go-ahead.
        if !parts.headers.contains_key(header::EXPECT) {
            discard(body).await;
        }
        return Err(too_large);
    }
    let mut chunks = body.into_data_stream();
    let mut bytes = Vec::new();
    let whole = async {
        while let Some(chunk) = chunks.next().await {
            let chunk = chunk.map_err(|error| ApiError::BodyBroken { message: error.to_string() })?;
            if bytes.len() + chunk.len() > BODY_BYTES_MAX {
                return Err(too_large);
            }
            bytes.extend_from_slice(&chunk);
        }
        Ok(())
    };
    let read = timeout(BODY_TIMEOUT, whole).await.unwrap_or(Err(ApiError::BodyTooSlow { seconds: BODY_TIMEOUT.as_secs() }));
    if matches!(read, Err(ApiError::BodyTooLarge { .. })) {
        discard(Body::from_stream(chunks)).await;
    }
    read.map(|()| bytes.into())
}

/// Reads on without keeping anything, within limits.
async fn discard(body: Body) {
    let mut chunks = body.into_data_stream();
    let all = async {
        let mut seen_bytes = 0;
        while let Some(Ok(chunk)) = chunks.next().await {
            seen_bytes += chunk.len() as u64;
            if seen_bytes > DISCARDED_BYTES_MAX {
                break;
            }
        }
    };
    // Running into the limit only means that the client may not see why it is refused.
    let _ = timeout(DISCARD_TIMEOUT, all).await;
}
