//! Explains errors of the system and of HTTP in plain words.
//!
//! This is the one place that knows how the system and the HTTP library name them. It imports nothing of this crate, so
//! every module may use it.

use std::error::Error;
use std::io::{self, ErrorKind};
use std::net::IpAddr;

/// Beginning of the clause for a refused connection.
const REFUSED: &str = "connection refused";
/// The system resolver's message for an unknown name.
const NO_SUCH_NAME: &str = "failed to lookup address";

/// One clause that says what happened, for the end of a sentence. It comes from the innermost cause; the outer ones only
/// say that something failed.
#[must_use]
pub fn explain(error: &(dyn Error + 'static)) -> String {
    let place = place(error);
    let place = |or: &str| place.clone().unwrap_or_else(|| or.to_owned());
    for cause in causes(error) {
        if let Some(error) = cause.downcast_ref::<io::Error>() {
            match error.kind() {
                ErrorKind::ConnectionRefused => return format!("{REFUSED}: nothing listens on {}", place("that port")),
                ErrorKind::HostUnreachable | ErrorKind::NetworkUnreachable => {
                    return format!("there is no route to {}", place("that host"));
                }
                ErrorKind::TimedOut => return silent(&place("it")),
                ErrorKind::ConnectionReset
                | ErrorKind::ConnectionAborted
                | ErrorKind::BrokenPipe
                | ErrorKind::UnexpectedEof => return "the connection broke off".to_owned(),
                _ => {}
            }
        }
        if let Some(error) = cause.downcast_ref::<hyper::Error>() {
            if error.is_incomplete_message() || error.is_closed() || error.is_canceled() {
                return "the connection closed before the answer came".to_owned();
            }
            if error.is_parse() {
                return format!("{} does not speak HTTP", place("that port"));
            }
        }
        if cause
            .downcast_ref::<reqwest::Error>()
            .is_some_and(reqwest::Error::is_timeout)
        {
            return silent(&place("it"));
        }
    }
    let innermost = causes(error).last().unwrap_or(error).to_string();
    if innermost.contains(NO_SUCH_NAME) {
        return format!("the host name of {} is not known", place("that address"));
    }
    without_number(&innermost).to_owned()
}

fn silent(place: &str) -> String {
    format!("no answer from {place} in time")
}

/// Whether [`explain`] found that nothing listens, so that starting the server helps.
#[must_use]
pub fn is_refused(explained: &str) -> bool {
    explained.starts_with(REFUSED)
}

/// Explains an answer with an error status. A refused key reads differently, because the server is up.
#[must_use]
pub fn refused(url: &str, status: u16, message: &str) -> String {
    match status {
        401 | 403 => {
            let hint = if is_on_this_host(url) {
                ", or start it as the user who runs this one: each user's servers take the key of that user's file `local_key`"
            } else {
                ""
            };
            format!(
                "{url} is up and refuses our key ({status}: {message}); set the key that it takes as `api_key_file` of its \
                 section{hint}"
            )
        }
        _ => format!("{url} answered {status}: {message}"),
    }
}

/// Whether the URL has a loopback address.
fn is_on_this_host(url: &str) -> bool {
    let is_loopback =
        |host: &str| host == "localhost" || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback());
    reqwest::Url::parse(url).is_ok_and(|url| url.host_str().is_some_and(is_loopback))
}

/// The `HOST:PORT` that was asked.
fn place(error: &(dyn Error + 'static)) -> Option<String> {
    let url = causes(error).find_map(|cause| cause.downcast_ref::<reqwest::Error>()?.url())?;
    Some(format!("{}:{}", url.host_str()?, url.port_or_known_default()?))
}

/// An error and its causes, the innermost last.
pub fn causes<'a>(error: &'a (dyn Error + 'static)) -> impl Iterator<Item = &'a (dyn Error + 'static)> {
    std::iter::successors(Some(error), |error: &&'a (dyn Error + 'static)| (*error).source())
}

/// The text without the number that Rust adds: `Permission denied (os error 13)`.
fn without_number(text: &str) -> &str {
    text.split_once(" (os error ").map_or(text, |(words, _)| words)
}

#[cfg(test)]
#[expect(
    clippy::disallowed_methods,
    reason = "a server of the test, and the failures of a plain client"
)]
mod tests {
    use tokio::io::AsyncWriteExt;
    use tokio::net::TcpListener;

    use super::*;

    /// What comes of a GET from a server that sends this and closes.
    async fn explained(answer: &'static str) -> (String, String) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        tokio::spawn(async move {
            while let Ok((mut client, _)) = listener.accept().await {
                let mut request = [0; 1024];
                let _ = tokio::io::AsyncReadExt::read(&mut client, &mut request).await;
                let _ = client.write_all(answer.as_bytes()).await;
            }
        });
        let get = async {
            reqwest::Client::builder()
                .no_proxy()
                .build()?
                .get(format!("http://{address}"))
                .send()
                .await?
                .bytes()
                .await
        };
        (explain(&get.await.unwrap_err()), address)
    }

    #[tokio::test]
    async fn a_server_that_is_not_there_and_one_that_breaks_off_are_told_without_jargon() {
        let free = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
        let get = reqwest::Client::builder()
            .no_proxy()
            .build()
            .unwrap()
            .get(format!("http://{free}"));
        let words = explain(&get.send().await.unwrap_err());
        assert_eq!(words, format!("connection refused: nothing listens on {free}"));
        assert!(is_refused(&words));

        let cut = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhel";
        assert_eq!(explained(cut).await.0, "the connection broke off");
        assert_eq!(explained("").await.0, "the connection closed before the answer came");
        let (words, address) = explained("SSH-2.0-OpenSSH\r\n").await;
        assert_eq!(words, format!("{address} does not speak HTTP"));
    }

    #[tokio::test]
    async fn a_name_that_nobody_knows_is_told() {
        let get = reqwest::Client::builder()
            .no_proxy()
            .build()
            .unwrap()
            .get("http://no-such-host.invalid:80");
        let words = explain(&get.send().await.unwrap_err());
        assert_eq!(words, "the host name of no-such-host.invalid:80 is not known");
    }

    #[test]
    fn the_systems_words_come_without_a_number() {
        let error = std::fs::read("/no/such/file").unwrap_err();
        assert_eq!(explain(&error), "No such file or directory");
    }

    #[test]
    fn a_wrong_key_reads_otherwise_than_a_server_that_is_not_there() {
        let words = refused("http://h:1/health", 401, "Invalid API Key");
        assert!(words.contains("is up and refuses our key"), "{words}");
        assert!(!words.contains("local_key"), "{words}");
        let words = refused("http://127.0.0.1:1/health", 401, "Invalid API Key");
        assert!(words.ends_with("the key of that user's file `local_key`"), "{words}");
        assert_eq!(refused("http://h:1", 500, "no"), "http://h:1 answered 500: no");
    }
}
