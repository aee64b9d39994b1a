//! The token that clients send.

use axum::http::{HeaderMap, HeaderValue, header};
use subtle::ConstantTimeEq;

use crate::config::Secret;

/// The headers that Anthropic's and Azure's clients send their key in.
pub(crate) const API_KEYS: [&str; 2] = ["x-api-key", "api-key"];

/// Whether a request with these headers knows the token.
pub(crate) fn is_known(token: &Secret, headers: &HeaderMap) -> bool {
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
