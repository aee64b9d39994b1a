//! Whom `proxy stop` and `stop` end, and whom they never do.

use std::fs::{self, File};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use tempfile::TempDir;

/// A user with a proxy that has no target.
struct User {
    folder: TempDir,
    port: u16,
}

/// Something in the background, which is killed at the end of the test.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl User {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let config = format!("proxy: {{ port: {port}, target: {{ url: \"http://127.0.0.1:1\" }} }}\n");
        fs::write(folder.path().join("tightwad.yaml"), config).unwrap();
        fs::create_dir(folder.path().join("tightwad")).unwrap();
        Self { folder, port }
    }

    fn tightwad(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_tightwad"));
        command.args(args).current_dir(self.folder.path()).env_clear();
        command.env("PATH", std::env::var_os("PATH").unwrap());
        command
            .env("HOME", self.folder.path())
            .env("XDG_RUNTIME_DIR", self.folder.path());
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        command
    }

    fn stop(&self) -> Output {
        self.tightwad(&["proxy", "stop"]).output().unwrap()
    }

    fn pid_file(&self) -> PathBuf {
        self.folder.path().join(format!("tightwad/proxy-{}.pid", self.port))
    }

    fn start(&self) -> Running {
        let mut proxy = Running(self.tightwad(&["proxy", "start"]).spawn().unwrap());
        let began = Instant::now();
        while TcpStream::connect(("127.0.0.1", self.port)).is_err() {
            assert!(proxy.0.try_wait().unwrap().is_none(), "the proxy has ended");
            assert!(began.elapsed() < Duration::from_secs(20), "the proxy does not listen");
            sleep(Duration::from_millis(10));
        }
        proxy
    }
}

#[test]
fn a_process_with_a_number_that_was_another_ones_is_never_stopped() {
    let user = User::new();
    let mut bystander = Running(Command::new("sleep").arg("60").spawn().unwrap());
    let number = bystander.0.id();
    // As an older version wrote it, and with the start of a process that had the number before.
    for content in [number.to_string(), format!("{number} 1")] {
        fs::write(user.pid_file(), content).unwrap();
        let held = File::open(user.pid_file()).unwrap();
        held.lock().unwrap();
        let stopped = user.stop();
        assert!(!stopped.status.success(), "{stopped:?}");
        assert!(bystander.0.try_wait().unwrap().is_none(), "it was stopped");
    }
}

#[test]
fn a_look_at_the_file_does_not_keep_a_proxy_from_starting() {
    let user = User::new();
    fs::write(user.pid_file(), "").unwrap();
    let looking = File::open(user.pid_file()).unwrap();
    looking.lock_shared().unwrap();
    let look = std::thread::spawn(move || {
        sleep(Duration::from_millis(300));
        drop(looking);
    });
    let mut proxy = user.start();
    look.join().unwrap();
    let mode = fs::metadata(user.pid_file()).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let stopped = user.stop();
    assert!(stopped.status.success(), "{stopped:?}");
    assert!(proxy.0.wait().unwrap().success());
}
