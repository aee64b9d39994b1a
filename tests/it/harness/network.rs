use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use super::llama_server::Program;
use super::wait::eventually;

/// Set where a test has a network of its own.
const OWN: &str = "TEST_HAS_NETWORK";
/// A user without rights may make networks within a user namespace.
const UNSHARE: [&str; 3] = ["--user", "--map-root-user", "--net"];

/// Whether this process is the one that runs the test with this name: in a network namespace of its own, in which it may
/// do what it likes and sees nobody else. Everybody else has it run there, and is told what came of it; where the machine
/// forbids that, only a message.
pub fn is_own(test: &str) -> bool {
    if std::env::var_os(OWN).is_some() {
        must("ip", &["link", "set", "lo", "up"]);
        return true;
    }
    let ways = [("unshare", &[&UNSHARE[..], &["true"]].concat()[..]), ("ip", &["-V"])];
    if let Some(why) = ways.into_iter().find_map(|(program, args)| try_it(program, args).err()) {
        println!("skipped, since this machine allows no network namespaces: {why}");
        return false;
    }
    let status = Command::new("unshare")
        .args(UNSHARE)
        .arg("--")
        .arg(std::env::current_exe().expect("this program"))
        .args([test, "--exact", "--include-ignored", "--nocapture"])
        .env(OWN, "yes")
        .status();
    assert!(status.expect("it starts").success(), "see above");
    false
}

/// Another host, at the other end of a cable.
pub struct FarHost {
    namespace: Program,
}

impl FarHost {
    /// Its address; this side is `10.77.0.1`.
    pub const ADDRESS: &str = "10.77.0.2";

    /// To be called in a network of the test's own.
    pub async fn new() -> Self {
        let namespace = Program::start(Path::new("unshare"), &["--net", "sleep", "600"]);
        let own = std::fs::read_link("/proc/self/ns/net").expect("a network");
        let pid = eventually(Duration::from_secs(5), || async {
            let pid = namespace.known_pid().ok_or("it does not start")?;
            match std::fs::read_link(format!("/proc/{pid}/ns/net")) {
                Ok(other) if other != own => Ok(pid.to_string()),
                _ => Err("it has no network of its own"),
            }
        });
        let pid = pid.await.expect("another network");
        let far = Self { namespace };
        must(
            "ip",
            &[
                "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", &pid,
            ],
        );
        must("ip", &["address", "add", "10.77.0.1/24", "dev", "cable"]);
        must("ip", &["link", "set", "cable", "up"]);
        let address = format!("{}/24", Self::ADDRESS);
        for command in [
            &["ip", "link", "set", "lo", "up"][..],
            &["ip", "address", "add", &address, "dev", "cable"],
            &["ip", "link", "set", "cable", "up"],
        ] {
            far.must(command);
        }
        far
    }

    /// Makes each trip over the cable take longer, in both directions; or why this machine cannot.
    pub fn delay(&self, trip: Duration) -> Result<(), String> {
        let trip = format!("{}us", trip.as_micros());
        let netem = ["tc", "qdisc", "add", "dev", "cable", "root", "netem", "delay", &trip];
        try_it(netem[0], &netem[1..])?;
        self.must(&netem);
        Ok(())
    }

    /// Pulls the cable out of it. Nobody is told: what is sent is lost.
    pub fn unplug(&self) {
        self.must(&["ip", "link", "set", "cable", "down"]);
    }

    /// Puts it back.
    pub fn plug(&self) {
        self.must(&["ip", "link", "set", "cable", "up"]);
    }

    /// Runs a program there.
    pub fn start(&self, program: &Path, args: &[&str]) -> Program {
        let network = self.network();
        let program = program.to_str().expect("a path in UTF-8");
        Program::start(Path::new("nsenter"), &[&[&network, "--", program], args].concat())
    }

    fn must(&self, command: &[&str]) {
        let network = self.network();
        must("nsenter", &[&[&network, "--"], command].concat());
    }

    fn network(&self) -> String {
        format!("--net=/proc/{}/ns/net", self.namespace.pid())
    }
}

fn try_it(program: &str, args: &[&str]) -> Result<(), String> {
    let output = Command::new(program).args(args).stdin(Stdio::null()).output();
    let output = output.map_err(|error| format!("{program}: {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(format!("{program} {}: {}", args.join(" "), said.trim()))
}

fn must(program: &str, args: &[&str]) {
    if let Err(why) = try_it(program, args) {
        panic!("{why}");
    }
}
