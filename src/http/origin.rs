//! Which web pages may use a server, by the headers that browsers send and pages cannot change: `Host` and `Origin`.
//!
//! Without a token, any web page in the browser of a user who can reach the server could use it: directly, or under a host
//! name of the page's own that points to the server (DNS rebinding). So such a server answers only requests for its own host
//! names, and only its own pages and those of `cors_origins`. With a token, the token protects the server; pages that are not
//! in `cors_origins` cannot read its answers.

use std::net::IpAddr;
use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::uri::Authority;
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Uri, header};
use axum::middleware::{self, Next};
use axum::response::Response;

use super::body::discard;
use super::excerpt::excerpt;
use super::paths::Dialect;
use super::refusal::Refusal;
use super::serve::TurnedAway;
use crate::config::is_loopback;

/// The methods that a page may use.
const METHODS: &str = "GET, HEAD, POST, PUT, PATCH, DELETE";
/// The headers that a page may send, if it does not say which it wants to. `*` would not cover `Authorization`.
const REQUEST_HEADERS: &str = "authorization, content-type, x-api-key, api-key";
/// The headers that a page may read.
const ANSWER_HEADERS: &str = "x-request-id, retry-after";
/// Seconds for which a browser need not ask again.
const MAX_AGE: &str = "600";
/// All headers of answers that are about other origins begin so; only ours count.
const CORS: &str = "access-control-";
/// Names that nobody can register in the public DNS.
const PRIVATE: [&str; 5] = [".localhost", ".local", ".internal", ".lan", ".home.arpa"];

/// Decides who may use one server.
#[derive(Debug, Clone)]
pub(crate) struct Guard {
    origins: Origins,
    /// The names that it answers to, where no token is asked for; `None`: to any.
    names: Option<Names>,
    /// The key of the config that allows origins, if there is one.
    key: Option<&'static str>,
}

/// The pages of other servers that may use this one.
#[derive(Debug, Clone)]
enum Origins {
    Any,
    Listed(Vec<String>),
}

#[derive(Debug, Clone)]
struct Names {
    own: Vec<String>,
    /// Only this machine can reach it, so that no network's short names mean it.
    loopback: bool,
}

/// Why a request is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Foreign {
    #[error("this endpoint asks for no token and so answers to its own names only, not to `{host}`: {remedy}")]
    Host { host: String, remedy: String },
    #[error("pages of `{origin}` may not use this endpoint: {remedy}")]
    Origin { origin: String, remedy: String },
}

impl Guard {
    /// Of a server that listens on `host`.
    pub(crate) fn new(host: &str, asks_for_token: bool, origins: &[String], key: Option<&'static str>) -> Self {
        let origins = if origins.iter().any(|origin| origin == "*") {
            Origins::Any
        } else {
            Origins::Listed(origins.iter().map(|origin| origin.to_ascii_lowercase()).collect())
        };
        let names = (!asks_for_token && !matches!(origins, Origins::Any)).then(|| Names {
            own: [Some(host.to_owned()), machine_name()]
                .into_iter()
                .flatten()
                .map(|name| name.to_ascii_lowercase())
                .collect(),
            loopback: is_loopback(host),
        });
        Self { origins, names, key }
    }

    /// The value of `Access-Control-Allow-Origin` for the answer; `None` if no page asks, or a page of this server.
    fn check(&self, uri: &Uri, headers: &HeaderMap) -> Result<Option<HeaderValue>, Foreign> {
        let hosts: Vec<&str> = uri
            .authority()
            .map(Authority::as_str)
            .into_iter()
            .chain(headers.get_all(header::HOST).iter().map(text))
            .collect();
        if let Some(names) = &self.names
            && let Some(host) = hosts.iter().find(|host| !self.is_own(names, host))
        {
            let host = excerpt(host);
            let remedy = match self.key {
                Some(key) => format!("call it by its address, set a token, or add `http://{host}` to `{key}`"),
                None => "call it by its address".to_owned(),
            };
            return Err(Foreign::Host { host, remedy });
        }
        let mut asking = headers.get_all(header::ORIGIN).iter();
        let Some(origin) = asking.next() else {
            return Ok(None);
        };
        let lower = text(origin).to_ascii_lowercase();
        let single = asking.next().is_none();
        match &self.origins {
            Origins::Any => Ok(Some(HeaderValue::from_static("*"))),
            Origins::Listed(origins) if single && origins.contains(&lower) => Ok(Some(origin.clone())),
            Origins::Listed(_) if self.names.is_none() => Ok(None),
            Origins::Listed(_) if single && is_same(&lower, &hosts) => Ok(None),
            Origins::Listed(_) => Err(Foreign::Origin {
                origin: excerpt(text(origin)),
                remedy: match self.key {
                    Some(key) => format!("add that origin to `{key}` to let them"),
                    None => "no page may".to_owned(),
                },
            }),
        }
    }

    fn is_own(&self, names: &Names, authority: &str) -> bool {
        let Ok(authority) = authority.parse::<Authority>() else {
            return false;
        };
        let host = authority.host().to_ascii_lowercase();
        let host = host.strip_suffix('.').unwrap_or(&host);
        if host.is_empty() || authority.as_str().contains('@') {
            return false;
        }
        let listed = |origin: &String| host_of(origin).is_some_and(|it| it == host);
        let is_address = host.trim_matches(['[', ']']).parse::<IpAddr>().is_ok();
        is_address
            || host == "localhost"
            || names.own.iter().any(|own| own == host)
            || PRIVATE.iter().any(|suffix| host.ends_with(suffix))
            || (!names.loopback && !host.contains('.'))
            || matches!(&self.origins, Origins::Listed(origins) if origins.iter().any(listed))
    }

    /// Puts our headers for pages in the place of all others.
    fn mark(&self, headers: &mut HeaderMap, allowed: Option<&HeaderValue>) {
        let theirs: Vec<HeaderName> = headers
            .keys()
            .filter(|name| name.as_str().starts_with(CORS))
            .cloned()
            .collect();
        for name in theirs {
            headers.remove(name);
        }
        if matches!(&self.origins, Origins::Listed(origins) if !origins.is_empty()) {
            headers.append(header::VARY, HeaderValue::from_static("Origin"));
        }
        if let Some(origin) = allowed {
            headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin.clone());
            headers.insert(
                header::ACCESS_CONTROL_EXPOSE_HEADERS,
                HeaderValue::from_static(ANSWER_HEADERS),
            );
        }
    }
}

/// Lets `guard` look at every request of the router first. `refuse` writes its answer to those that it refuses, whose path
/// it gets. `OPTIONS`, by which browsers ask for permission, is answered here, whatever body it announces; so are requests for
/// which there is no connection left.
pub(crate) fn guarded(router: Router, guard: Guard, refuse: fn(&Foreign, &str) -> Response) -> Router {
    router.layer(middleware::from_fn_with_state(Arc::new((guard, refuse)), admit))
}

type Refuse = fn(&Foreign, &str) -> Response;

async fn admit(State(state): State<Arc<(Guard, Refuse)>>, request: Request, next: Next) -> Response {
    let (guard, refuse) = &*state;
    let allowed = match guard.check(request.uri(), request.headers()) {
        Ok(allowed) => allowed,
        Err(foreign) => {
            tracing::warn!("refused: {foreign}");
            let (parts, body) = request.into_parts();
            discard(body, &parts.headers);
            let mut response = refuse(&foreign, parts.uri.path());
            guard.mark(response.headers_mut(), None);
            return response;
        }
    };
    if request.method() == Method::OPTIONS {
        let mut response = Response::new(Body::empty());
        *response.status_mut() = StatusCode::NO_CONTENT;
        let headers = response.headers_mut();
        headers.insert(header::ALLOW, HeaderValue::from_static(METHODS));
        guard.mark(headers, allowed.as_ref());
        if allowed.is_some() {
            permit(request.headers(), headers);
        }
        return response;
    }
    let mut response = if request.extensions().get::<TurnedAway>().is_some() {
        let (parts, body) = request.into_parts();
        discard(body, &parts.headers);
        Refusal::TooManyConnections.response(Dialect::of(parts.uri.path()))
    } else {
        next.run(request).await
    };
    guard.mark(response.headers_mut(), allowed.as_ref());
    response
}

/// Answers a page that asks what it may send.
fn permit(asked: &HeaderMap, headers: &mut HeaderMap) {
    let wanted = asked.get(header::ACCESS_CONTROL_REQUEST_HEADERS).cloned();
    let wanted = wanted.unwrap_or(HeaderValue::from_static(REQUEST_HEADERS));
    headers.insert(header::ACCESS_CONTROL_ALLOW_HEADERS, wanted);
    headers.insert(header::ACCESS_CONTROL_ALLOW_METHODS, HeaderValue::from_static(METHODS));
    headers.insert(header::ACCESS_CONTROL_MAX_AGE, HeaderValue::from_static(MAX_AGE));
}

fn text(value: &HeaderValue) -> &str {
    value.to_str().unwrap_or("?")
}

/// Whether a page of `origin` comes from where the request goes to. The port is the one that the client knows: a proxy in
/// between may speak TLS.
fn is_same(origin: &str, hosts: &[&str]) -> bool {
    let authority = origin
        .strip_prefix("http://")
        .or_else(|| origin.strip_prefix("https://"));
    authority.is_some_and(|authority| hosts.first().is_some_and(|host| host.eq_ignore_ascii_case(authority)))
}

/// The host of an origin, in lower case as the origin is.
fn host_of(origin: &str) -> Option<&str> {
    let (_, authority) = origin.split_once("://")?;
    match authority.strip_prefix('[') {
        Some(v6) => v6.split_once(']').map(|(address, _)| address),
        None => authority.split(':').next(),
    }
}

/// The host name of this machine.
fn machine_name() -> Option<String> {
    let name = rustix::system::uname();
    let name = name.nodename().to_str().ok()?;
    (!name.is_empty()).then(|| name.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(guard: &Guard, host: &str, origin: Option<&str>) -> Result<Option<String>, Foreign> {
        let mut headers = HeaderMap::new();
        headers.insert(header::HOST, HeaderValue::from_str(host).unwrap());
        if let Some(origin) = origin {
            headers.insert(header::ORIGIN, HeaderValue::from_str(origin).unwrap());
        }
        let allowed = guard.check(&Uri::from_static("/"), &headers)?;
        Ok(allowed.map(|value| value.to_str().unwrap().to_owned()))
    }

    fn guard(host: &str, token: bool, origins: &[&str]) -> Guard {
        let origins: Vec<String> = origins.iter().map(ToString::to_string).collect();
        Guard::new(host, token, &origins, Some("proxy.cors_origins"))
    }

    #[test]
    fn a_server_without_a_token_answers_to_its_own_names_only() {
        let machine = machine_name().unwrap();
        let loopback = guard("127.0.0.1", false, &["https://ai.example.net"]);
        for host in [
            "127.0.0.1:8088",
            "127.0.0.1",
            "192.168.1.7:1",
            "[::1]:8088",
            "[::1]",
            "localhost:8088",
            "LOCALHOST.",
            "gaming-pc.local:8088",
            "host.docker.internal:8088",
            "tower.lan",
            "ai.example.net",
            machine.as_str(),
        ] {
            assert_eq!(asked(&loopback, host, None), Ok(None), "{host}");
        }
        for host in [
            "evil.example:8088",
            "127.0.0.1.evil.example",
            "localhost.evil.example",
            "short:8088",
            "local",
            "user@127.0.0.1",
            "",
            ":8088",
            "127.0.0.1:8088, evil.example",
        ] {
            assert!(asked(&loopback, host, None).is_err(), "{host}");
        }
        let network = guard("tower.example.net", false, &[]);
        for host in ["tower.example.net:8088", "short:8088"] {
            assert_eq!(asked(&network, host, None), Ok(None), "{host}");
        }
        assert!(asked(&network, "evil.example", None).is_err());
        assert_eq!(asked(&guard("0.0.0.0", true, &[]), "evil.example", None), Ok(None));
    }

    #[test]
    fn a_page_from_elsewhere_may_use_a_server_without_a_token_only_if_it_is_listed() {
        let open = guard("127.0.0.1", false, &["http://localhost:3000", "app://Obsidian.md"]);
        for origin in ["http://localhost:3000", "HTTP://LOCALHOST:3000", "app://obsidian.md"] {
            assert_eq!(
                asked(&open, "127.0.0.1:8088", Some(origin)),
                Ok(Some(origin.to_owned()))
            );
        }
        for origin in ["http://127.0.0.1:8088", "https://127.0.0.1:8088"] {
            assert_eq!(asked(&open, "127.0.0.1:8088", Some(origin)), Ok(None), "its own page");
        }
        for origin in [
            "https://evil.example",
            "http://localhost:3001",
            "http://localhost",
            "http://127.0.0.1:8089",
            "http://127.0.0.1",
            "null",
            "",
            "http://localhost:3000.evil.example",
        ] {
            let refused = asked(&open, "127.0.0.1:8088", Some(origin)).unwrap_err();
            assert!(refused.to_string().contains("`proxy.cors_origins`"), "{refused}");
        }
    }

    #[test]
    fn with_a_token_only_listed_pages_may_read_answers_and_none_is_refused() {
        let closed = guard("0.0.0.0", true, &["http://localhost:3000"]);
        assert_eq!(asked(&closed, "any", Some("https://evil.example")), Ok(None));
        assert_eq!(
            asked(&closed, "any", Some("http://localhost:3000")),
            Ok(Some("http://localhost:3000".to_owned()))
        );
        for token in [true, false] {
            let any = guard("127.0.0.1", token, &["*"]);
            let allowed = asked(&any, "evil.example", Some("https://evil.example"));
            assert_eq!(allowed, Ok(Some("*".to_owned())), "{token}");
        }
    }

    #[test]
    fn two_hosts_or_two_origins_are_no_way_in() {
        let open = guard("127.0.0.1", false, &["http://localhost:3000"]);
        let mut headers = HeaderMap::new();
        headers.insert(header::HOST, HeaderValue::from_static("127.0.0.1:8088"));
        assert!(
            open.check(&Uri::from_static("http://evil.example/v1/models"), &headers)
                .is_err()
        );
        headers.append(header::HOST, HeaderValue::from_static("evil.example"));
        assert!(open.check(&Uri::from_static("/"), &headers).is_err());
        headers.insert(header::HOST, HeaderValue::from_static("127.0.0.1:8088"));
        headers.append(header::ORIGIN, HeaderValue::from_static("http://localhost:3000"));
        headers.append(header::ORIGIN, HeaderValue::from_static("https://evil.example"));
        assert!(open.check(&Uri::from_static("/"), &headers).is_err());
    }
}
