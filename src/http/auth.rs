//! Authentication of clients, for every server: the token, and the one layer that asks for it.
//!
//! A secret is compared in constant time. A request without the token reaches no handler, except on the paths that are open.

use axum::Router;
use axum::extract::Request;
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderValue, header};
use axum::middleware::{self, Next};
use axum::response::Response;
use subtle::ConstantTimeEq;

use super::body::discard;

use crate::config::Secret;

/// The headers that Anthropic's and Azure's clients send their key in.
pub(crate) const API_KEYS: [&str; 2] = ["x-api-key", "api-key"];

/// What a server asks of its clients.
#[derive(Debug, Clone)]
pub(crate) struct Auth {
    /// `None`: the server asks for no token.
    token: Option<Secret>,
    /// Paths that are answered without the token.
    open: &'static [&'static str],
}

impl Auth {
    pub(crate) fn new(token: Option<Secret>, open: &'static [&'static str]) -> Self {
        Self { token, open }
    }

    /// Whether the server asks for a token.
    pub(crate) fn asks_for_token(&self) -> bool {
        self.token.is_some()
    }

    /// Whether these headers have the token, or none is asked for.
    pub(crate) fn admits(&self, headers: &HeaderMap) -> bool {
        self.token.as_ref().is_none_or(|token| is_known(token, headers))
    }
}

/// Asks for the token before any handler of `router`. `refuse` writes the answer to a request without it.
pub(crate) fn guarded(
    router: Router,
    auth: Auth,
    refuse: impl Fn(&Parts) -> Response + Clone + Send + Sync + 'static,
) -> Router {
    router.layer(middleware::from_fn(move |request: Request, next: Next| {
        let admitted = auth.open.contains(&request.uri().path()) || auth.admits(request.headers());
        let refuse = refuse.clone();
        async move {
            if admitted {
                return next.run(request).await;
            }
            let (parts, body) = request.into_parts();
            discard(body, &parts.headers);
            refuse(&parts)
        }
    }))
}

/// A random name of 128 bits in hexadecimal digits, which nobody can guess.
pub(crate) fn unguessable() -> String {
    format!("{:032x}", rand::random::<u128>())
}

/// Whether these headers have the token.
fn is_known(token: &Secret, headers: &HeaderMap) -> bool {
    let token = token.expose().as_bytes();
    let bearers = headers
        .get_all(header::AUTHORIZATION)
        .iter()
        .filter_map(|value| bearer(value.as_bytes()));
    let keys = API_KEYS
        .iter()
        .flat_map(|name| headers.get_all(*name))
        .map(HeaderValue::as_bytes);
    bearers.chain(keys).any(|given| bool::from(given.ct_eq(token)))
}

/// Whether `given` is the secret.
pub(crate) fn is_equal(secret: &Secret, given: &HeaderValue) -> bool {
    given.as_bytes().ct_eq(secret.expose().as_bytes()).into()
}

fn bearer(value: &[u8]) -> Option<&[u8]> {
    const SCHEME: &[u8] = b"bearer ";
    let (scheme, token) = value.split_at_checked(SCHEME.len())?;
    scheme.eq_ignore_ascii_case(SCHEME).then(|| token.trim_ascii())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn knows(name: &'static str, value: &[u8]) -> bool {
        let mut headers = HeaderMap::new();
        headers.insert(name, HeaderValue::from_bytes(value).unwrap());
        is_known(&Secret::new("s3cret"), &headers)
    }

    #[test]
    fn the_token_is_taken_from_any_of_its_headers_and_nothing_else_is() {
        assert!(knows("authorization", b"Bearer s3cret"));
        assert!(knows("authorization", b"bearer  s3cret "));
        assert!(knows("x-api-key", b"s3cret"));
        assert!(knows("api-key", b"s3cret"));
        assert!(!knows("authorization", b"s3cret"));
        assert!(!knows("authorization", b"Basic s3cret"));
        assert!(!knows("authorization", b"Bearer s3cre"));
        assert!(!knows("authorization", b"Bearer s3cretx"));
        assert!(!knows("authorization", b"Bearer "));
        assert!(!knows("authorization", "Bearer gehe\u{ef}m\u{e9}".as_bytes()));
        assert!(!knows("cookie", b"s3cret"));
    }
}
