//! Which headers go on to the other side.
//!
//! Headers of one hop, and those by which a client could draft or read another client's answer, never reach the server
//! behind.

use axum::http::{HeaderMap, HeaderName, HeaderValue, header};

use super::auth::API_KEYS;

/// Names a completion at the target, so that a drafter can attach to it.
pub(crate) const X_DRAFT_KEY: HeaderName = HeaderName::from_static("x-draft-key");

/// Authorises a drafter at the coordinator: the value is `coordinator.draft_key`.
pub(crate) const X_DRAFT_AUTHORIZATION: HeaderName = HeaderName::from_static("x-draft-authorization");

/// Makes llama-server go on after the client hangs up, and give the answer to any client that names the same id.
const X_CONVERSATION_ID: HeaderName = HeaderName::from_static("x-conversation-id");

/// Marks a completion that only measures the server. No client waits for its text, so a coordinator that swaps its model
/// ends it at once.
pub const MEASURING: &str = "x-tightwad-measuring";

/// Id of a request in the logs of every server that handles it.
pub(crate) const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Tells nginx not to buffer a stream.
pub(crate) const X_ACCEL_BUFFERING: HeaderName = HeaderName::from_static("x-accel-buffering");

/// Headers that concern one connection only (RFC 9110, section 7.6.1).
const HOP_BY_HOP: [HeaderName; 8] = [
    header::CONNECTION,
    HeaderName::from_static("keep-alive"),
    header::PROXY_AUTHENTICATE,
    header::PROXY_AUTHORIZATION,
    header::TE,
    header::TRAILER,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
];

/// The headers of a client's request that the server behind gets, without those that only Tightwad may set.
pub(crate) fn to_target(mut headers: HeaderMap, credentials: Credentials<'_>) -> HeaderMap {
    drop_hop_by_hop(&mut headers);
    for name in [
        header::HOST,
        header::CONTENT_LENGTH,
        header::EXPECT,
        X_DRAFT_KEY,
        X_DRAFT_AUTHORIZATION,
        X_CONVERSATION_ID,
    ] {
        headers.remove(name);
    }
    headers.remove(MEASURING);
    match credentials {
        Credentials::Clients => {}
        Credentials::None => drop_credentials(&mut headers),
        Credentials::Targets(key) => {
            drop_credentials(&mut headers);
            headers.insert(header::AUTHORIZATION, key.clone());
        }
    }
    headers
}

/// The headers of the server's answer that the client gets.
pub(crate) fn to_client(mut headers: HeaderMap) -> HeaderMap {
    drop_hop_by_hop(&mut headers);
    headers
}

/// The credentials that the server behind gets.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Credentials<'a> {
    /// Those of the client.
    Clients,
    /// None: the client's are meant for this server, and the one behind asks for none.
    None,
    /// The key of the server behind.
    Targets(&'a HeaderValue),
}

fn drop_credentials(headers: &mut HeaderMap) {
    headers.remove(header::AUTHORIZATION);
    for name in API_KEYS {
        headers.remove(name);
    }
}

fn drop_hop_by_hop(headers: &mut HeaderMap) {
    let named: Vec<HeaderName> = headers
        .get_all(header::CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|name| name.trim().parse().ok())
        .collect();
    for name in named.iter().chain(&HOP_BY_HOP) {
        headers.remove(name);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_cannot_pass_for_a_drafter_or_a_measurement() {
        let names = ["x-draft-key", MEASURING, "x-mine"];
        let headers = names.map(|name| (HeaderName::from_static(name), HeaderValue::from_static("1")));
        let kept = to_target(HeaderMap::from_iter(headers), Credentials::None);
        assert_eq!(kept.keys().collect::<Vec<_>>(), ["x-mine"]);
    }

    #[test]
    fn what_the_connection_header_names_stays_on_its_hop() {
        let mut headers = HeaderMap::new();
        headers.insert("connection", HeaderValue::from_static("close, X-Mine"));
        headers.insert("x-mine", HeaderValue::from_static("1"));
        headers.insert("x-yours", HeaderValue::from_static("2"));
        headers.insert("transfer-encoding", HeaderValue::from_static("chunked"));
        let kept = to_client(headers);
        assert_eq!(kept.keys().collect::<Vec<_>>(), ["x-yours"]);
    }
}
