//! Which listeners need a token.

use super::Place;
use tightwad::config::{Proxy, Secret, Server, Upstream, Worker};

#[test]
fn an_open_proxy_parses_but_may_not_listen() {
    let place = Place::with_file("proxy:\n  host: 0.0.0.0\n  target: { url: http://a }\n");
    let loaded = place.load().unwrap();
    let refusal = loaded.check_listeners().unwrap_err().to_string();
    assert!(
        place
            .short(&refusal)
            .starts_with("tightwad.yaml:2: proxy.host: refusing to listen on 0.0.0.0"),
        "{refusal}"
    );
    for way_out in [
        "proxy.auth_token_file",
        "proxy.auth_token)",
        "proxy.allow_unauthenticated: true",
    ] {
        assert!(refusal.contains(way_out), "{refusal}");
    }
    let bare = loaded.config.check_listeners().unwrap_err().to_string();
    assert!(bare.starts_with("proxy.host: refusing"), "{bare}");
}

#[test]
fn a_token_loopback_or_consent_opens_the_proxy() {
    for key in [
        "host: '::1'",
        "host: localhost",
        "auth_token: x",
        "auth_token_file: x",
        "allow_unauthenticated: true",
    ] {
        let host = if key.starts_with("host") {
            ""
        } else {
            "host: 0.0.0.0\n  "
        };
        let place = Place::with_file(&format!("proxy:\n  {host}{key}\n  target: {{ url: http://a }}\n"));
        assert!(place.load().unwrap().check_listeners().is_ok(), "{key}");
    }
}

#[test]
fn an_open_llama_server_parses_but_may_not_listen_and_each_section_answers_for_itself() {
    for section in ["coordinator", "target", "draft"] {
        let open = format!(
            "models: {{ a: {{ path: a }} }}\nproxy: {{ target: {{ url: 'http://a' }} }}\n{section}:\n  host: 0.0.0.0\n"
        );
        let loaded = Place::with_file(&open).load().unwrap();
        assert!(loaded.check_listener("proxy").is_ok());
        let refusal = loaded.check_listener(section).unwrap_err().to_string();
        for way_out in [
            format!(":4: {section}.host: refusing to listen on 0.0.0.0"),
            format!("{section}.api_key_file"),
            format!("{section}.allow_unauthenticated: true"),
        ] {
            assert!(refusal.contains(&way_out), "{refusal}");
        }
        for key in ["api_key: x", "api_key_file: x", "allow_unauthenticated: true"] {
            let place = Place::with_file(&format!("{open}  {key}\n"));
            assert!(place.load().unwrap().check_listeners().is_ok(), "{section}: {key}");
        }
    }
}

#[test]
fn many_rpc_endpoints_are_a_warning() {
    let place = Place::with_file("workers: [ { host: a }, { host: b }, { host: c } ]");
    assert!(place.load().unwrap().warnings[0].contains("28487"));
}

#[test]
fn a_token_is_read_from_its_file() {
    let place = Place::new().file("token", "  s3cret\n").file("empty", "\n");
    let proxy = |name: &str| Proxy {
        auth_token_file: Some(place.path(name)),
        ..Proxy::default()
    };
    assert_eq!(proxy("token").token().unwrap(), Some(Secret::new("s3cret")));
    let error = |name: &str| place.short(&proxy(name).token().unwrap_err().to_string());
    assert_eq!(
        error("empty"),
        "proxy.auth_token_file: empty: is empty; it should hold the token in one line"
    );
    assert!(error("gone").starts_with("proxy.auth_token_file: gone: cannot be read: "));
    assert_eq!(Proxy::default().token().unwrap(), None);

    let upstream = Upstream {
        api_key: Some(Secret::new("k")),
        ..Upstream::at("http://a")
    };
    assert_eq!(upstream.api_key().unwrap(), Some(Secret::new("k")));
    let server = Server {
        api_key_file: Some(place.path("token")),
        ..Server::default()
    };
    assert_eq!(server.api_key().unwrap(), Some(Secret::new("s3cret")));
}

#[test]
fn a_worker_has_an_agent_only_with_a_token_or_where_nobody_else_gets_at_it() {
    let worker = |agent_port, token: Option<&str>, host: &str| Worker {
        agent_port,
        agent_token: token.map(Secret::new),
        ..Worker::at(host)
    };
    assert!(worker(1, Some("t"), "10.0.0.2").has_agent());
    assert!(worker(1, None, "127.0.0.1").has_agent());
    assert!(!worker(1, None, "10.0.0.2").has_agent());
    assert!(!worker(0, Some("t"), "10.0.0.2").has_agent());
}
