//! `tightwad status` and `tightwad proxy status`.

use super::{JSON, LOADING, Running, SOON, User, eventually, free_port, serves, tiny_model};

#[test]
fn the_status_of_another_server_is_one_sentence_without_its_page() {
    for answer in [
        "HTTP/1.1 404 Not Found\r\nContent-Type: text/html\r\nConnection: close\r\n\r\n<html>\n<body>no such page</body>",
        "HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nConnection: close\r\n\r\n<html>\n<body>welcome</body>",
        "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\n\r\n{\"hello\":1}",
    ] {
        let user = User::new();
        let port = serves(answer);
        user.config(&format!(
            "proxy: {{ port: {port}, target: {{ url: \"http://127.0.0.1:1\" }} }}\n"
        ));
        let ended = user.run(&["proxy", "status"]);
        ended.fails(6, &["no proxy of Tightwad's", &port.to_string(), "`port`"]);
        user.run(&["status"]).fails(6, &["no proxy of Tightwad's"]);
        assert!(
            !ended.stderr.contains('<') && ended.stderr.lines().count() == 1,
            "{ended:?}"
        );
    }
}

#[test]
fn the_status_of_a_proxy_whose_target_is_down_is_shown_and_exits_6() {
    let user = User::new();
    let _proxy = user.proxy_without_target();
    let ended = user.run(&["proxy", "status"]);
    ended.fails(6, &["no target that answers"]);
    assert!(ended.stdout.contains("http://127.0.0.1:1: down"), "{ended:?}");
}

#[test]
fn the_status_of_a_proxy_whose_draft_is_down_is_shown_and_exits_13() {
    let user = User::new();
    let (port, target) = (free_port(), serves(JSON));
    user.config(&format!(
        "proxy: {{ port: {port}, target: {{ url: \"http://127.0.0.1:{target}\" }}, draft: {{ url: \"http://127.0.0.1:1\" }} }}\n"
    ));
    let _proxy = Running::start(user.tightwad(&["proxy", "start"]));
    eventually(SOON, "the target is found", || {
        let ended = user.run(&["proxy", "status"]);
        ended.code != Some(7) && ended.stdout.contains(&format!("{target}: healthy"))
    });
    let ended = user.run(&["proxy", "status"]);
    ended.fails(13, &["http://127.0.0.1:1", "tightwad run draft"]);
    assert!(ended.stdout.contains(": up "), "{ended:?}");
    user.run(&["status"]).fails(13, &["http://127.0.0.1:1"]);
}

#[test]
fn the_status_ends_with_the_worst_of_what_the_file_declares() {
    let user = User::new();
    let model = tiny_model();
    let model = model.display();
    let status = |target: u16, draft: u16, worker: &str| {
        user.config(&format!(
            "target: {{ port: {target}, model: big }}\ndraft: {{ port: {draft}, model: small }}\n{worker}\n\
             models: {{ big: {{ path: {model} }}, small: {{ path: {model} }} }}\n"
        ));
        user.run(&["status"])
    };
    let (well, loading) = (serves(JSON), serves(LOADING));
    let draft = serves(JSON);
    let all_is_well = status(well, draft, "");
    assert_eq!(all_is_well.code, Some(0), "{all_is_well:?}");
    for line in [
        format!("target        http://127.0.0.1:{well}, big: ready"),
        format!("draft         http://127.0.0.1:{draft}, small: ready"),
    ] {
        assert!(
            all_is_well.stdout.contains(&line),
            "`{line}` is missing in {all_is_well:?}"
        );
    }
    status(well, free_port(), "").fails(13, &["no draft runs", "tightwad run draft"]);
    status(loading, draft, "").fails(6, &["loads its model"]);
    status(free_port(), free_port(), "").fails(7, &["no target runs", "tightwad run target", "no draft runs"]);
    let worker = format!(
        "workers: [ {{ host: 127.0.0.1, agent_port: {}, agent_token: t }} ]",
        free_port()
    );
    status(well, free_port(), &worker).fails(6, &["down: 127.0.0.1", "no draft runs"]);
}

#[test]
fn a_target_of_this_host_that_is_down_is_down_though_the_proxy_has_not_noticed_yet() {
    let user = User::new();
    let target = free_port();
    let body = format!(
        r#"{{"verification":"attached","target":{{"url":"http://127.0.0.1:{target}","healthy":true}},"drafts":[]}}"#
    );
    let answer = format!(
        "HTTP/1.1 200 OK\r\nContent-Length: {}\r\nContent-Type: application/json\r\nConnection: close\r\n\r\n{body}",
        body.len()
    );
    user.config(&format!(
        "proxy: {{ port: {} }}\ntarget: {{ port: {target} }}\nmodels: {{ big: {{ path: {} }} }}\n",
        serves(answer.leak()),
        tiny_model().display()
    ));
    user.run(&["status"])
        .fails(7, &["no target runs", "tightwad run target"]);
}

#[test]
fn a_draft_that_is_down_is_named_once_though_its_section_and_the_proxy_both_know_it() {
    let user = User::new();
    let (target, draft) = (serves(JSON), free_port());
    let body = format!(
        r#"{{"verification":"none","target":{{"url":"http://127.0.0.1:{target}","healthy":true}},
            "drafts":[{{"url":"http://127.0.0.1:{draft}","healthy":false}}]}}"#
    );
    let answer = format!(
        "HTTP/1.1 200 OK\r\nContent-Length: {}\r\nContent-Type: application/json\r\nConnection: close\r\n\r\n{body}",
        body.len()
    );
    user.config(&format!(
        "proxy: {{ port: {} }}\ntarget: {{ port: {target} }}\ndraft: {{ port: {draft} }}\nmodels: {{ big: {{ path: {} }} }}\n",
        serves(answer.leak()),
        tiny_model().display()
    ));
    let ended = user.run(&["status"]);
    ended.fails(13, &["no draft runs", "tightwad run draft"]);
    let url = format!("http://127.0.0.1:{draft}");
    assert_eq!(ended.stderr.matches(&url).count(), 1, "{ended:?}");
}

#[test]
fn the_status_fails_where_the_token_of_the_proxy_cannot_be_read() {
    let user = User::new();
    user.config("proxy: { auth_token_file: nowhere, target: { url: \"http://127.0.0.1:1\" } }\n");
    user.run(&["status"]).fails(4, &["proxy.auth_token_file", "nowhere"]);
}

#[test]
fn a_target_on_the_loopback_address_of_another_host_is_not_taken_for_down() {
    let user = User::new();
    user.config(&format!(
        "proxy: {{ host: 192.0.2.1, auth_token: t }}\ntarget: {{ port: {} }}\nmodels: {{ big: {{ path: {} }} }}\n",
        free_port(),
        tiny_model().display()
    ));
    let ended = user.run(&["status"]);
    assert!(ended.stdout.contains("it is not asked from here"), "{ended:?}");
    assert!(!ended.stderr.contains("no target runs"), "{ended:?}");
}
