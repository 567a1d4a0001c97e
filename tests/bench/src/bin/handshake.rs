//! The server's CPU time for one full handshake, without I/O and store, against one signature and one verification.
//!
//! `cargo run --release -p ossicle-bench --bin handshake`; the goal is 1.30 or less with aws-lc and 2048-bit keys.

use core::time::Duration;

use ossicle::crypto::{HostAead, IdentityKey, verify};
use ossicle_bench::{cpu_time, median};
use ossicle_core::{
    Ask, ClientConfig, Connection, Credentials, Event, PublicKey, Received, ServerConfig, Settings, Statement,
};

const ROUNDS: usize = 400;

fn main() -> Result<(), Box<dyn core::error::Error>> {
    let (server_key, client_key) = (IdentityKey::generate(2048)?, IdentityKey::generate(2048)?);
    let (mut handshakes, mut limits) = (Vec::new(), Vec::new());
    for round in 0..ROUNDS {
        // Interleaved, so that what disturbs one disturbs the other.
        let (statement, cpu) = handshake(&server_key, &client_key, round as u8)?;
        handshakes.push(cpu);
        let begun = cpu_time();
        let signature = server_key.sign(&statement)?;
        assert!(verify(server_key.modulus(), &statement, &signature));
        limits.push(cpu_time() - begun);
    }
    let (handshake, limit) = (median(&mut handshakes), median(&mut limits));
    println!("server's CPU per full handshake {handshake:?}, one signature and one verification {limit:?}");
    println!("ratio {:.2} (goal 1.30 or less)", handshake.as_secs_f64() / limit.as_secs_f64());
    Ok(())
}

/// One handshake; returns the CPU time of the server's half and a statement to sign.
fn handshake(
    server_key: &IdentityKey,
    client_key: &IdentityKey,
    round: u8,
) -> Result<(Statement, Duration), Box<dyn core::error::Error>> {
    let server_public = PublicKey::from_modulus(server_key.modulus())?;
    let client_fingerprint = PublicKey::from_modulus(client_key.modulus())?.fingerprint();
    let fingerprint = server_public.fingerprint();
    let credentials = Credentials::Key { id: [1; 16], key_epoch: 0, fingerprint: client_fingerprint };
    let config = ClientConfig { server: Some(fingerprint), ask_for_key: false, record_limit: 16_408 };
    let mut client: Connection<HostAead> = Connection::client(config, &[round; 64]);
    let (mut up, mut down) = ([0; 4096], [0; 4096]);
    let hello = client.transmit(&mut up)?;

    let begun = cpu_time();
    let config = ServerConfig { id: [2; 16], fingerprint, record_limit: 16_408 };
    let mut server: Connection<HostAead> = Connection::server(config, &[!round; 64]);
    server.receive(&mut up[..hello])?;
    let Some(Ask::Sign(statement)) = server.ask() else { return Err("the server must sign".into()) };
    let signature = server_key.sign(&statement)?;
    let sent = server.sign_server(server_public, &signature, &mut down)?;
    let mut cpu = cpu_time() - begun;

    let Received::Record { used, .. } = client.receive(&mut down[..sent])? else { return Err("a record".into()) };
    client.receive(&mut down[used..sent])?;
    client.verified(&credentials)?;
    let Some(Ask::Sign(own)) = client.ask() else { return Err("the client must sign".into()) };
    let signature = client_key.sign(&own)?;
    let sent = client.sign_client(&credentials, &signature, &mut up)?;

    let begun = cpu_time();
    let Received::Record { event: Event::CheckClient(claim), .. } = server.receive(&mut up[..sent])? else {
        return Err("a claim".into());
    };
    let bound = server.bind(&claim, &client_fingerprint)?;
    assert!(verify(client_key.modulus(), &bound, claim.signature()));
    server.accept(&Settings::default(), &mut down)?;
    cpu += cpu_time() - begun;
    Ok((statement, cpu))
}
