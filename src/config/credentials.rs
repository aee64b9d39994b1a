//! Secrets that systemd hands to a unit (`LoadCredential=proxy.auth_token_file:/run/secrets/token`).
//!
//! A credential replaces the file of the key with the same name: `proxy.auth_token_file`,
//! `proxy.target.api_key_file`, `proxy.target.draft_key_file`, `proxy.draft.api_key_file` (of several drafts
//! `proxy.draft.0.api_key_file`, …), `target.api_key_file`, `draft.api_key_file`, `coordinator.api_key_file`,
//! `coordinator.draft_key_file`, `workers.NAME.agent_token_file`. So the file itself can be readable for root only, whatever the unit's user.
//! A credential whose key is not in the cluster file has no effect.

use std::path::{Path, PathBuf};

use super::Config;
use super::environment::Environment;

/// Replaces the path of each secret's file by that of the credential, if there is one.
pub(super) fn take(config: &mut Config, environment: &Environment) {
    let Some(folder) = environment.get("CREDENTIALS_DIRECTORY").map(Path::new) else {
        return;
    };
    if let Some(proxy) = &mut config.proxy {
        replace(folder, "proxy.auth_token_file", &mut proxy.auth_token_file);
        if let Some(target) = &mut proxy.target {
            replace(folder, "proxy.target.api_key_file", &mut target.api_key_file);
            replace(folder, "proxy.target.draft_key_file", &mut target.draft_key_file);
        }
        if let [only] = proxy.draft.as_mut_slice() {
            replace(folder, "proxy.draft.api_key_file", &mut only.api_key_file);
        }
        for (number, draft) in proxy.draft.iter_mut().enumerate() {
            let name = format!("proxy.draft.{number}.api_key_file");
            replace(folder, &name, &mut draft.api_key_file);
        }
    }
    if let Some(target) = &mut config.target {
        replace(folder, "target.api_key_file", &mut target.api_key_file);
    }
    if let Some(draft) = &mut config.draft {
        replace(folder, "draft.api_key_file", &mut draft.api_key_file);
    }
    if let Some(coordinator) = &mut config.coordinator {
        replace(folder, "coordinator.api_key_file", &mut coordinator.api_key_file);
        replace(folder, "coordinator.draft_key_file", &mut coordinator.draft_key_file);
    }
    for worker in &mut config.workers {
        let name = format!("workers.{}.agent_token_file", worker.name());
        replace(folder, &name, &mut worker.agent_token_file);
    }
}

fn replace(folder: &Path, name: &str, file: &mut Option<PathBuf>) {
    // A worker's name may be no valid file name.
    let Some(file) = file.as_mut().filter(|_| !name.contains('/')) else {
        return;
    };
    let credential = folder.join(name);
    // A credential that cannot be accessed is used too, so that reading it reports the error.
    if credential.try_exists().unwrap_or(true) {
        *file = credential;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Coordinator, Proxy, Server, Upstream, Worker};

    /// A folder with these credentials, and the environment of a unit that has it.
    fn unit(names: &[&str]) -> (tempfile::TempDir, Environment) {
        let folder = tempfile::tempdir().unwrap();
        for name in names {
            std::fs::write(folder.path().join(name), "secret").unwrap();
        }
        let mut environment = Environment::default();
        let path = folder.path().to_str().unwrap().to_owned();
        environment.variables.insert("CREDENTIALS_DIRECTORY".into(), path);
        (folder, environment)
    }

    /// Something with a secret's file.
    fn upstream() -> Upstream {
        Upstream {
            api_key_file: Some("/secret".into()),
            ..Upstream::at("http://127.0.0.1:1")
        }
    }

    #[test]
    fn each_key_takes_the_credential_of_its_name() {
        let names = [
            "proxy.auth_token_file",
            "proxy.target.api_key_file",
            "proxy.draft.api_key_file",
            "target.api_key_file",
            "draft.api_key_file",
            "coordinator.api_key_file",
            "proxy.target.draft_key_file",
            "coordinator.draft_key_file",
            "workers.gaming-pc.agent_token_file",
            "workers.10.0.0.3.agent_token_file",
        ];
        let (folder, environment) = unit(&names);
        let secret: Option<PathBuf> = Some("/secret".into());
        let server = Server {
            api_key_file: secret.clone(),
            ..Server::default()
        };
        let worker = |name: Option<&str>, host: &str| Worker {
            name: name.map(str::to_owned),
            agent_token_file: secret.clone(),
            ..Worker::at(host)
        };
        let mut config = Config {
            proxy: Some(Proxy {
                auth_token_file: secret.clone(),
                target: Some(Upstream {
                    draft_key_file: secret.clone(),
                    ..upstream()
                }),
                draft: vec![upstream()],
                ..Proxy::default()
            }),
            target: Some(server.clone()),
            draft: Some(server),
            coordinator: Some(Coordinator {
                api_key_file: secret.clone(),
                draft_key_file: secret.clone(),
                ..Coordinator::default()
            }),
            workers: vec![worker(Some("gaming-pc"), "10.0.0.2"), worker(None, "10.0.0.3")],
            ..Config::default()
        };
        take(&mut config, &environment);
        let (proxy, coordinator) = (config.proxy.unwrap(), config.coordinator.unwrap());
        let target = proxy.target.unwrap();
        let read = [
            proxy.auth_token_file,
            target.api_key_file,
            proxy.draft[0].api_key_file.clone(),
            config.target.unwrap().api_key_file,
            config.draft.unwrap().api_key_file,
            coordinator.api_key_file,
            target.draft_key_file,
            coordinator.draft_key_file,
            config.workers[0].agent_token_file.clone(),
            config.workers[1].agent_token_file.clone(),
        ];
        assert_eq!(read, names.map(|name| Some(folder.path().join(name))));
    }

    #[test]
    fn drafts_of_a_list_are_told_apart_by_their_number() {
        let (folder, environment) = unit(&["proxy.draft.1.api_key_file", "proxy.draft.api_key_file"]);
        let proxy = Proxy {
            draft: vec![upstream(), upstream()],
            ..Proxy::default()
        };
        let mut config = Config {
            proxy: Some(proxy),
            ..Config::default()
        };
        take(&mut config, &environment);
        let drafts = config.proxy.unwrap().draft;
        assert_eq!(drafts[0].api_key_file, Some("/secret".into()));
        let credential = folder.path().join("proxy.draft.1.api_key_file");
        assert_eq!(drafts[1].api_key_file, Some(credential));
    }

    #[test]
    fn a_credential_whose_key_the_file_lacks_does_nothing() {
        let (_folder, environment) = unit(&["proxy.auth_token_file"]);
        let mut config = Config {
            proxy: Some(Proxy::default()),
            ..Config::default()
        };
        let before = config.clone();
        take(&mut config, &environment);
        assert_eq!(config, before);
    }
}
