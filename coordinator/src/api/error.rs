//! Everything that can be wrong with a request, and the one place that maps it to an HTTP status and to OpenAI's error object.

use crate::{adapters::ServeAdapterError, loading::LoadError, serving::RequestFailure};
use axum::{
    Json,
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use mlx_cluster_common::sampling::SamplingError;
use mlx_cluster_hub::HubErrorKind;
use serde_json::{Value, json};

/// Seconds after which a client may try again, when the model is not ready or the queue is full.
const RETRY_AFTER_S: u32 = 2;

/// Characters of a value that a message shows.
const SHOWN_CHARS_MAX: usize = 80;

#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub(super) enum ApiError {
    #[error("the body is not valid JSON: {message} at line {line}, column {column}")]
    InvalidJson { message: String, line: usize, column: usize },
    #[error("the JSON body is nested deeper than {max} levels")]
    JsonTooDeep { max: usize },
    #[error("the body is not UTF-8: the first wrong byte is at {offset}")]
    NotUtf8 { offset: usize },
    #[error("the body has more than {max_bytes} bytes; send less")]
    BodyTooLarge { max_bytes: usize },
    #[error("the body did not arrive within {seconds} s")]
    BodyTooSlow { seconds: u64 },
    #[error("the connection ended before the whole body had arrived: {message}")]
    BodyBroken { message: String },
    #[error("the content type is `{found}`; send JSON with `Content-Type: application/json`")]
    ContentType { found: String },
    #[error("`{param}` is missing{hint}")]
    Missing { param: String, hint: String },
    #[error("`{param}` must be {wanted}, not {found}")]
    WrongType { param: String, wanted: String, found: String },
    #[error("`{param}` must be {wanted}, not {found}")]
    OutOfRange { param: String, wanted: String, found: String },
    #[error("`{param}`: {message}")]
    Invalid { param: String, message: String },
    #[error("`{param}` is not supported{hint}; remove it from the request")]
    Unsupported { param: String, hint: String },
    #[error("the model `{asked}` is not served here; {served}")]
    ModelNotFound { asked: String, served: String },
    #[error("the prompt has {prompt_tokens} tokens, and the context of this model holds {context_tokens}{hint}")]
    PromptTooLong { prompt_tokens: usize, context_tokens: u32, hint: &'static str },
    #[error("the prompt has {prompt_bytes} bytes, far more than the {context_tokens} tokens that the context of this model holds")]
    PromptFarTooLong { prompt_bytes: usize, context_tokens: u32 },
    #[error("reading the prompt took longer than {seconds} s; send a shorter one")]
    TextTooSlow { seconds: u64 },
    #[error("the tokenizer of this model broke on this text: {message}")]
    TextBroke { message: String },
    #[error("the model is not ready ({state}){cause}")]
    NotReady { state: &'static str, cause: String },
    #[error("the coordinator is stopping")]
    Stopping,
    #[error("the answer broke off in the cluster, or its client read it too slowly; send the request again")]
    BrokeOff,
    #[error("there is nothing at {path}; the API is at /v1/chat/completions, /v1/completions and /v1/models")]
    NoSuchPath { path: String },
    #[error("{method} is not possible here; the Allow header says what is")]
    WrongMethod { method: String },
    #[error("this server is reached as localhost, not as `{host}`")]
    WrongHost { host: String },
    #[error("the Host header is missing or given twice")]
    BadHost,
    #[error("web pages of `{origin}` may not use this server")]
    ForeignOrigin { origin: String },
    #[error(transparent)]
    Failure(#[from] RequestFailure),
    /// The message of a [`LoadError`], and what kind of error it is.
    #[error("{message}")]
    Load { message: String, kind: LoadErrorKind },
    /// The message of a [`JobError`](crate::training::jobs::JobError), and what kind of error it is.
    #[error("{message}")]
    Job { message: String, kind: JobErrorKind },
}

/// What a client can do about a job that is not as it wants it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum JobErrorKind {
    NotFound,
    /// The job is not in a state for this.
    Conflict,
    /// Ask again when another one has ended.
    TooMany,
    Internal,
}

/// What a client can do about a model that is not loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum LoadErrorKind {
    NotThere,
    /// Ask again when something else is over.
    Conflict,
    /// Ask for something else.
    BadModel,
    /// The hub is not reached.
    Network,
    Internal,
}

impl ApiError {
    pub(super) fn status(&self) -> StatusCode {
        use ApiError as E;
        match self {
            E::InvalidJson { .. } | E::JsonTooDeep { .. } | E::NotUtf8 { .. } | E::BodyBroken { .. } => StatusCode::BAD_REQUEST,
            E::Missing { .. } | E::WrongType { .. } | E::OutOfRange { .. } | E::Invalid { .. } => StatusCode::BAD_REQUEST,
            E::Unsupported { .. } | E::PromptTooLong { .. } | E::PromptFarTooLong { .. } | E::BadHost => StatusCode::BAD_REQUEST,
            E::TextTooSlow { .. } | E::TextBroke { .. } => StatusCode::BAD_REQUEST,
            E::BodyTooLarge { .. } => StatusCode::PAYLOAD_TOO_LARGE,
            E::BodyTooSlow { .. } => StatusCode::REQUEST_TIMEOUT,
            E::ContentType { .. } => StatusCode::UNSUPPORTED_MEDIA_TYPE,
            E::ModelNotFound { .. } | E::NoSuchPath { .. } => StatusCode::NOT_FOUND,
            E::WrongMethod { .. } => StatusCode::METHOD_NOT_ALLOWED,
            E::WrongHost { .. } => StatusCode::MISDIRECTED_REQUEST,
            E::ForeignOrigin { .. } => StatusCode::FORBIDDEN,
            E::NotReady { .. } | E::Stopping => StatusCode::SERVICE_UNAVAILABLE,
            E::Failure(RequestFailure::NotReady { .. }) => StatusCode::SERVICE_UNAVAILABLE,
            E::Failure(RequestFailure::Overloaded { .. }) => StatusCode::TOO_MANY_REQUESTS,
            E::Failure(RequestFailure::Refused { .. }) => StatusCode::BAD_REQUEST,
            E::BrokeOff | E::Failure(RequestFailure::Broken { .. }) => StatusCode::BAD_GATEWAY,
            E::Load { kind, .. } => match kind {
                LoadErrorKind::NotThere => StatusCode::NOT_FOUND,
                LoadErrorKind::Conflict => StatusCode::CONFLICT,
                LoadErrorKind::BadModel => StatusCode::BAD_REQUEST,
                LoadErrorKind::Network => StatusCode::BAD_GATEWAY,
                LoadErrorKind::Internal => StatusCode::INTERNAL_SERVER_ERROR,
            },
            E::Job { kind, .. } => match kind {
                JobErrorKind::NotFound => StatusCode::NOT_FOUND,
                JobErrorKind::Conflict => StatusCode::CONFLICT,
                JobErrorKind::TooMany => StatusCode::TOO_MANY_REQUESTS,
                JobErrorKind::Internal => StatusCode::INTERNAL_SERVER_ERROR,
            },
        }
    }

    /// What programs can tell errors apart by; OpenAI's name where it has one.
    fn code(&self) -> &'static str {
        use ApiError as E;
        match self {
            E::InvalidJson { .. } => "invalid_json",
            E::JsonTooDeep { .. } => "json_too_deep",
            E::NotUtf8 { .. } => "invalid_utf8",
            E::BodyTooLarge { .. } => "body_too_large",
            E::BodyTooSlow { .. } => "body_too_slow",
            E::BodyBroken { .. } => "body_broken",
            E::ContentType { .. } => "unsupported_content_type",
            E::Missing { .. } => "missing_required_parameter",
            E::WrongType { .. } => "invalid_type",
            E::OutOfRange { .. } | E::Invalid { .. } => "invalid_value",
            E::Unsupported { .. } => "not_supported",
            E::ModelNotFound { .. } => "model_not_found",
            E::PromptTooLong { .. } | E::PromptFarTooLong { .. } => "context_length_exceeded",
            E::TextTooSlow { .. } => "prompt_too_slow",
            E::TextBroke { .. } => "tokenizer_broke",
            E::NotReady { .. } | E::Failure(RequestFailure::NotReady { .. }) => "model_not_ready",
            E::Stopping => "stopping",
            E::BrokeOff => "broke_off",
            E::NoSuchPath { .. } => "not_found",
            E::WrongMethod { .. } => "method_not_allowed",
            E::WrongHost { .. } | E::BadHost => "wrong_host",
            E::ForeignOrigin { .. } => "foreign_origin",
            E::Failure(RequestFailure::Overloaded { .. }) => "overloaded",
            E::Failure(RequestFailure::Refused { .. }) => "refused",
            E::Failure(RequestFailure::Broken { .. }) => "worker_failed",
            E::Load { kind: LoadErrorKind::Conflict, .. } => "conflict",
            E::Load { .. } => "model_not_loaded",
            E::Job { kind, .. } => match kind {
                JobErrorKind::NotFound => "job_not_found",
                JobErrorKind::Conflict => "conflict",
                JobErrorKind::TooMany => "overloaded",
                JobErrorKind::Internal => "job_failed",
            },
        }
    }

    fn param(&self) -> Option<&str> {
        match self {
            ApiError::Missing { param, .. }
            | ApiError::WrongType { param, .. }
            | ApiError::OutOfRange { param, .. }
            | ApiError::Invalid { param, .. }
            | ApiError::Unsupported { param, .. } => Some(param),
            ApiError::ModelNotFound { .. } => Some("model"),
            _ => None,
        }
    }

    /// OpenAI's error object, as it stands in a body and in a stream.
    pub(super) fn body(&self) -> Value {
        let kind = match self.status() {
            StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
            status if status.is_server_error() => "server_error",
            _ => "invalid_request_error",
        };
        json!({"error": {"message": self.to_string(), "type": kind, "param": self.param(), "code": self.code()}})
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let status = self.status();
        let mut response = (status, Json(self.body())).into_response();
        if matches!(status, StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE) {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(RETRY_AFTER_S));
        }
        if matches!(self, ApiError::BodyTooLarge { .. } | ApiError::BodyTooSlow { .. } | ApiError::BodyBroken { .. }) {
            // What is left of the body must not be read as the next request.
            response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
        response
    }
}

impl From<ServeAdapterError> for ApiError {
    fn from(error: ServeAdapterError) -> Self {
        use ServeAdapterError as E;
        let kind = match error {
            E::NameTaken { .. } | E::NothingServed | E::TooMany => LoadErrorKind::Conflict,
            E::NotThere { .. } => LoadErrorKind::NotThere,
            E::Name { .. } | E::NameOfModel { .. } | E::File { .. } | E::Misfit { .. } | E::Full { .. } | E::Engines { .. } => {
                LoadErrorKind::BadModel
            }
            E::Task { .. } => LoadErrorKind::Internal,
        };
        ApiError::Load { message: error.to_string(), kind }
    }
}

impl From<LoadError> for ApiError {
    fn from(error: LoadError) -> Self {
        let kind = match &error {
            LoadError::ServedAlready { .. } | LoadError::BeingRead { .. } | LoadError::NothingServed | LoadError::CalledOff { .. } => {
                LoadErrorKind::Conflict
            }
            LoadError::Model(error) => match error.kind() {
                HubErrorKind::NotFound | HubErrorKind::BadFile | HubErrorKind::Access => LoadErrorKind::BadModel,
                HubErrorKind::Network => LoadErrorKind::Network,
                HubErrorKind::Resources => LoadErrorKind::Internal,
            },
            LoadError::Plan(_) => LoadErrorKind::BadModel,
        };
        ApiError::Load { message: error.to_string(), kind }
    }
}

impl From<SamplingError> for ApiError {
    fn from(error: SamplingError) -> Self {
        ApiError::OutOfRange { param: error.param.into(), wanted: error.wanted, found: error.value }
    }
}

/// A value as a message shows it: on one line, printable, not longer than a line.
pub(super) fn shown(text: &str) -> String {
    let mut shown: String = text.chars().take(SHOWN_CHARS_MAX).flat_map(char::escape_debug).collect();
    if text.chars().nth(SHOWN_CHARS_MAX).is_some() {
        shown.push('…');
    }
    shown
}

/// A JSON value as a message shows it: its type, and the value itself where it is short.
pub(super) fn shown_value(value: &Value) -> String {
    match value {
        Value::Null => "null".into(),
        Value::Bool(value) => value.to_string(),
        Value::Number(value) => value.to_string(),
        Value::String(text) => format!("the string \"{}\"", shown(text)),
        Value::Array(items) => format!("a list of {}", items.len()),
        Value::Object(_) => "an object".into(),
    }
}
