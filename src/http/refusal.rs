//! Every error that a client can get, as an HTTP answer or as the last event of a stream, in the client's dialect.
//!
//! Each error names what failed and the next thing to do. This is the one place that turns an error into a response.

use axum::body::Body;
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::Response;
use bytes::Bytes;
use serde_json::{Value, json};

use super::bounds::Excess;
use super::origin::Foreign;
use super::paths::Dialect;

/// Most characters of a server's error that are quoted where that is not JSON.
const QUOTED: usize = 500;

/// Added to llama-server's error for a request that is longer than its context.
const CONTEXT_HINT: &str = " (`ctx_size` of the model, where `tightwad run` has started the server)";

/// Why the server behind does not answer a request.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Refusal {
    #[error("the token is missing or wrong: send it as `Authorization: Bearer <token>` or `x-api-key: <token>`")]
    Unauthorized,
    #[error("there is nothing for clients at this path: drafts are exchanged between the proxy and the target")]
    Hidden,
    #[error(
        "there is nothing for clients at this path: it shows or changes what concerns all clients of the target; send the request to the target itself"
    )]
    Owners,
    #[error("{reason}")]
    NotADrafter { reason: &'static str },
    #[error("this is not Ollama: use an OpenAI connection with the base URL http://{host}/v1")]
    NotOllama { host: String },
    #[error(
        "the model `{name}` only drafts for this endpoint: ask for the target's model (`GET /v1/models`), or leave `model` out"
    )]
    Drafter { name: String },
    #[error("this path takes GET and HEAD only")]
    MethodNotAllowed,
    #[error("the request body is larger than {limit} bytes: send less, or raise `proxy.max_body_size`")]
    TooLarge { limit: u64 },
    #[error(
        "the request body is compressed (`Content-Encoding: {encoding}`), which this endpoint does not read: send it as it is"
    )]
    Encoded { encoding: String },
    #[error(
        "the request body nests arrays and objects deeper than {} levels: flatten it",
        super::nesting::DEEPEST
    )]
    TooDeep,
    #[error("`{param}` {excess}: more can stop the target for everybody; simplify it")]
    Unbearable { param: &'static str, excess: Excess },
    #[error("a form cannot have a field `grammar`: send the request as a JSON object")]
    GrammarInForm,
    #[error("the request body ended early: {0}")]
    BodyCut(String),
    #[error("the request body came too slowly: send it faster, or send less")]
    TooSlow,
    #[error("the requests of others take all memory that is for request bodies: send the request again later")]
    NoMemory,
    #[error("this endpoint has as many connections as it can take: send the request again later")]
    TooManyConnections,
    #[error(transparent)]
    Foreign(Foreign),
    #[error("the request body is not a JSON object: {0}")]
    NotJson(#[from] serde_json::Error),
    #[error("`{param}` must be a whole number, -1 (no limit) or more, but is {given}")]
    NotACount { param: &'static str, given: String },
    #[error(
        "`{param}` is {given}, but this endpoint answers at most {limit} tokens: ask for {limit} or fewer, or raise `proxy.max_tokens_limit`"
    )]
    TooManyTokens {
        param: &'static str,
        given: i64,
        limit: u64,
    },
    #[error(
        "the draft server at {url} is down ({problem}): start it, or set `proxy.fallback_on_draft_failure: true` to be answered without it"
    )]
    DrafterDown { url: String, problem: String },
    #[error(
        "the target at {url} cannot be reached ({cause}): start it (`tightwad run target`), or correct its URL in the config"
    )]
    Unreachable { url: String, cause: String },
    #[error("the target at {url} broke off ({cause}): see its log; the request can be sent again")]
    BrokeOff { url: String, cause: String },
    #[error(
        "the target at {url} answered a streamed request with `{content_type}` instead of an event stream: send it with `\"stream\": false`"
    )]
    NotAStream { url: String, content_type: String },
    #[error("the proxy is shutting down; the request can be sent again once it is back")]
    ShuttingDown,
}

impl Refusal {
    /// For a client of Ollama that has sent `headers`.
    pub(crate) fn not_ollama(headers: &HeaderMap) -> Self {
        let host = headers.get(header::HOST).and_then(|host| host.to_str().ok());
        Self::NotOllama {
            host: host.unwrap_or("HOST:PORT").to_owned(),
        }
    }

    pub(crate) fn status(&self) -> StatusCode {
        match self {
            Self::Unauthorized => StatusCode::UNAUTHORIZED,
            Self::Hidden | Self::Owners | Self::NotOllama { .. } | Self::Drafter { .. } => StatusCode::NOT_FOUND,
            Self::NotADrafter { .. } | Self::Foreign(_) => StatusCode::FORBIDDEN,
            Self::MethodNotAllowed => StatusCode::METHOD_NOT_ALLOWED,
            Self::TooSlow => StatusCode::REQUEST_TIMEOUT,
            Self::TooLarge { .. } => StatusCode::PAYLOAD_TOO_LARGE,
            Self::Encoded { .. } => StatusCode::UNSUPPORTED_MEDIA_TYPE,
            Self::TooDeep
            | Self::Unbearable { .. }
            | Self::GrammarInForm
            | Self::BodyCut(_)
            | Self::NotJson(_)
            | Self::NotACount { .. }
            | Self::TooManyTokens { .. } => StatusCode::BAD_REQUEST,
            Self::DrafterDown { .. }
            | Self::Unreachable { .. }
            | Self::ShuttingDown
            | Self::NoMemory
            | Self::TooManyConnections => StatusCode::SERVICE_UNAVAILABLE,
            Self::BrokeOff { .. } | Self::NotAStream { .. } => StatusCode::BAD_GATEWAY,
        }
    }

    fn code(&self) -> &'static str {
        match self {
            Self::Unauthorized => "invalid_api_key",
            Self::Hidden | Self::Owners | Self::NotOllama { .. } => "not_found",
            Self::Drafter { .. } => "model_not_found",
            Self::NotADrafter { .. } => "not_a_drafter",
            Self::MethodNotAllowed => "method_not_allowed",
            Self::TooLarge { .. } => "body_too_large",
            Self::Encoded { .. } => "unsupported_encoding",
            Self::TooDeep => "nested_too_deep",
            Self::Unbearable { .. } | Self::GrammarInForm => "too_complex",
            Self::BodyCut(_) => "body_incomplete",
            Self::TooSlow => "body_too_slow",
            Self::NoMemory => "overloaded",
            Self::TooManyConnections => "too_many_connections",
            Self::Foreign(_) => "foreign_origin",
            Self::NotJson(_) => "invalid_json",
            Self::NotACount { .. } | Self::TooManyTokens { .. } => "invalid_value",
            Self::DrafterDown { .. } => "draft_unavailable",
            Self::Unreachable { .. } => "target_unreachable",
            Self::BrokeOff { .. } => "target_broke_off",
            Self::NotAStream { .. } => "target_did_not_stream",
            Self::ShuttingDown => "shutting_down",
        }
    }

    fn param(&self) -> Option<&'static str> {
        match self {
            Self::NotACount { param, .. } | Self::TooManyTokens { param, .. } | Self::Unbearable { param, .. } => {
                Some(param)
            }
            _ => None,
        }
    }

    /// Value of `Retry-After` in seconds.
    fn retry_after(&self) -> Option<&'static str> {
        matches!(
            self,
            Self::Unreachable { .. } | Self::DrafterDown { .. } | Self::NoMemory | Self::TooManyConnections
        )
        .then_some("5")
    }

    fn json(&self, dialect: Dialect) -> Value {
        let error = json!({
            "message": self.to_string(),
            "type": kind(dialect, self.status()),
            "code": self.code(),
            "param": self.param(),
        });
        in_dialect(dialect, &error)
    }

    /// As an HTTP answer.
    pub(crate) fn response(&self, dialect: Dialect) -> Response {
        let mut response = error_response(self.status(), &self.json(dialect), self.retry_after());
        if matches!(self, Self::Unauthorized) {
            let headers = response.headers_mut();
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }

    /// As the last event of a stream whose 200 is out already.
    pub(crate) fn event(&self, dialect: Dialect) -> Bytes {
        event(dialect, &self.json(dialect))
    }
}

/// The error type that the dialect's client libraries know.
fn kind(dialect: Dialect, status: StatusCode) -> &'static str {
    match (dialect, status) {
        (Dialect::Anthropic, StatusCode::UNAUTHORIZED) => "authentication_error",
        (Dialect::Anthropic, StatusCode::FORBIDDEN) => "permission_error",
        (Dialect::Anthropic, StatusCode::NOT_FOUND) => "not_found_error",
        (Dialect::Anthropic, StatusCode::PAYLOAD_TOO_LARGE) => "request_too_large",
        (Dialect::Anthropic, status) if status.is_server_error() => "api_error",
        (Dialect::OpenAi, status) if status.is_server_error() => "server_error",
        _ => "invalid_request_error",
    }
}

/// An error as an HTTP answer; `retry_after` is in seconds.
pub(crate) fn error_response(status: StatusCode, body: &Value, retry_after: Option<&'static str>) -> Response {
    let mut response = Response::new(Body::from(body.to_string()));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    if let Some(seconds) = retry_after {
        headers.insert(header::RETRY_AFTER, HeaderValue::from_static(seconds));
    }
    response
}

/// The server's own error as the last event of a stream whose 200 is out already.
pub(crate) fn targets_error(dialect: Dialect, status: StatusCode, body: &[u8]) -> Bytes {
    let own = serde_json::from_slice::<Value>(body)
        .ok()
        .and_then(|mut body| body.get_mut("error").map(Value::take));
    let error = match own {
        Some(error @ Value::Object(_)) => error,
        other => {
            let text = match other {
                Some(Value::String(text)) => text,
                _ => String::from_utf8_lossy(body).chars().take(QUOTED).collect(),
            };
            json!({
                "message": format!("the target answered {status}: {text}"),
                "type": if status.is_client_error() { "invalid_request_error" } else { "server_error" },
                "code": status.as_u16(),
                "param": null,
            })
        }
    };
    event(dialect, &in_dialect(dialect, &error))
}

/// The server's own error in the client's dialect, and with the key of the config that it is about; `None` if nothing has to
/// change.
pub(crate) fn explained(dialect: Dialect, status: StatusCode, body: &[u8]) -> Option<Bytes> {
    let mut body: Value = serde_json::from_slice(body).ok()?;
    let foreign = dialect == Dialect::Anthropic && body.get("type").is_none_or(|kind| kind != "error");
    let error = body.get_mut("error")?;
    let overflows = error
        .get("type")
        .is_some_and(|kind| kind == "exceed_context_size_error");
    if let Some(Value::String(message)) = error.get_mut("message").filter(|_| overflows) {
        message.push_str(CONTEXT_HINT);
    }
    if let (Value::String(message), true) = (&*error, foreign) {
        *error = json!({ "message": message, "type": kind(dialect, status) });
    }
    let explained = match (foreign, overflows) {
        (true, _) => in_dialect(dialect, error),
        (false, true) => body,
        (false, false) => return None,
    };
    Some(explained.to_string().into())
}

/// The body of an error in a dialect.
pub(crate) fn in_dialect(dialect: Dialect, error: &Value) -> Value {
    match dialect {
        Dialect::OpenAi => json!({ "error": error }),
        Dialect::Anthropic => json!({ "type": "error", "error": error }),
    }
}

/// The last event of a stream.
pub(crate) fn event(dialect: Dialect, data: &Value) -> Bytes {
    match dialect {
        Dialect::OpenAi => format!("data: {data}\n\n"),
        Dialect::Anthropic => format!("event: error\ndata: {data}\n\n"),
    }
    .into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_targets_error_that_is_no_json_is_quoted_on_one_line() {
        let event = targets_error(Dialect::OpenAi, StatusCode::BAD_GATEWAY, b"<html>\nbad\n</html>");
        let text = std::str::from_utf8(&event).unwrap();
        assert_eq!(text.matches('\n').count(), 2, "{text}");
        assert!(
            text.starts_with("data: {\"error\":{") && text.contains("502 Bad Gateway"),
            "{text}"
        );
    }

    #[test]
    fn a_targets_error_is_changed_only_where_its_client_needs_it() {
        let plain = br#"{"error":{"code":400,"message":"no","type":"invalid_request_error"}}"#;
        let long = br#"{"error":{"message":"too long.","type":"exceed_context_size_error","n_ctx":4096}}"#;
        let told = |dialect, body: &[u8]| {
            let explained = explained(dialect, StatusCode::BAD_REQUEST, body)?;
            Some(serde_json::from_slice::<Value>(&explained).unwrap())
        };
        assert_eq!(told(Dialect::OpenAi, plain), None);
        assert_eq!(told(Dialect::OpenAi, b"<html>"), None);
        let anthropic = told(Dialect::Anthropic, plain).unwrap();
        assert_eq!(
            (&anthropic["type"], &anthropic["error"]["code"]),
            (&json!("error"), &json!(400))
        );
        assert_eq!(told(Dialect::Anthropic, anthropic.to_string().as_bytes()), None);
        let text = told(Dialect::Anthropic, br#"{"error":"no"}"#).unwrap();
        let expected = json!({ "message": "no", "type": "invalid_request_error" });
        assert_eq!(text, json!({ "type": "error", "error": expected }));
        let hinted = told(Dialect::OpenAi, long).unwrap();
        let message = hinted["error"]["message"].as_str().unwrap();
        assert!(message.starts_with("too long. (`ctx_size`"), "{message}");
        assert_eq!(hinted["error"]["n_ctx"], 4096);
    }

    #[test]
    fn a_targets_own_error_object_is_kept() {
        let body = br#"{"error":{"code":400,"message":"too long","type":"exceed_context_size_error","n_ctx":4096}}"#;
        let event = targets_error(Dialect::Anthropic, StatusCode::BAD_REQUEST, body);
        let text = std::str::from_utf8(&event).unwrap();
        assert!(text.starts_with("event: error\ndata: {"), "{text}");
        assert!(
            text.contains(r#""n_ctx":4096"#) && text.contains(r#""type":"error""#),
            "{text}"
        );
    }
}
