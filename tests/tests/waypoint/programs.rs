//! Clients and servers that others wrote: nginx, curl, wrk, h2load, tonic and a WebSocket library. `tests/packages.sh` installs
//! the programs.

use std::fs;
use std::io::Read;
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use ambit_api::discovery::aggregated_discovery_service_client::AggregatedDiscoveryServiceClient;
use ambit_api::discovery::aggregated_discovery_service_server::{
    AggregatedDiscoveryService, AggregatedDiscoveryServiceServer,
};
use ambit_api::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse};
use ambit_local::{Command, Pod, PodOptions};
use ambit_tests::beds::Trials;
use ambit_tests::wait::{self, SOON};
use futures_util::{SinkExt, StreamExt};
use hyper_util::rt::TokioIo;
use tokio_stream::wrappers::TcpListenerStream;
use tokio_tungstenite::tungstenite::Message;
use tonic::transport::Endpoint;
use tonic::{Request, Response, Status, Streaming};

use crate::bed::{PORT, Waypoints};

pub(crate) fn add(trials: &mut Trials<Waypoints>) {
    trials.add("nginx serves curl, wrk and h2load in HTTP/1.1", async |bed| {
        serves(bed, "webone", "http").await;
    });
    trials
        .add("nginx serves curl, wrk and h2load in HTTP/2", async |bed| serves(bed, "webtwo", "http2").await);
    trials.add("a tonic client and server stream both ways", async |bed| streams(bed).await);
    trials.add("a WebSocket client and server talk", async |bed| chats(bed).await);
}

/// How long a program may take, on a machine that does other things too.
const LIMIT: Duration = Duration::from_secs(90);
/// Size of the big file, bytes.
const BIG: usize = 20 << 20;

/// Everything that nginx writes goes to the test's own directory.
fn configuration(at: &Path, listen: &str) -> String {
    let at = at.display();
    let kinds = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"];
    let temporary: String = kinds.iter().map(|kind| format!("{kind}_temp_path {at}/{kind};\n")).collect();
    format!(
        "daemon off;\nuser root;\npid {at}/pid;\nerror_log {at}/error.log;\nevents {{ worker_connections 1024; }}\n\
         http {{\n{temporary}access_log off;\nkeepalive_requests 1000000;\n\
         server {{ listen {listen}; root {at}; location = / {{ return 200 'x-forwarded-for: $http_x_forwarded_for'; }} }}\n}}\n"
    )
}

/// Runs a program in a pod to its end, which must be a good one; what it said.
async fn run(pod: &Pod, command: Command) -> String {
    let output = tempfile::NamedTempFile::new().unwrap();
    let shown = format!("{command:?}");
    let process = pod.spawn(command.log_file(output.path())).await.unwrap();
    let status = process.wait_within(LIMIT).await;
    let said = String::from_utf8_lossy(&fs::read(output.path()).unwrap()).into_owned();
    let status = status.unwrap_or_else(|error| panic!("{error}: {said}"));
    assert!(status.success(), "{shown} ended with {status}: {said}");
    said
}

async fn serves(bed: &Waypoints, name: &str, protocol: &str) {
    let directory = tempfile::tempdir().unwrap();
    let at = directory.path();
    let mut big = vec![0; BIG];
    fs::File::open("/dev/urandom").unwrap().read_exact(&mut big).unwrap();
    fs::write(at.join("big"), &big).unwrap();
    fs::write(at.join("page"), "x".repeat(2000)).unwrap();
    let pod = PodOptions::new("shop", name).service_account(name).label("app", name).node(1);
    let pod = bed.cluster.pod(pod).await.unwrap();
    let listen = match protocol {
        "http2" => format!("{}:{PORT} http2", pod.ip()),
        _ => format!("{}:{PORT}", pod.ip()),
    };
    fs::write(at.join("nginx.conf"), configuration(at, &listen)).unwrap();
    let conf = at.join("nginx.conf");
    let nginx =
        pod.spawn(Command::new("/usr/sbin/nginx").args(["-c", conf.to_str().unwrap()])).await.unwrap();
    let to = bed.bind(name, protocol).await;
    bed.eventually(to, "/", "", |answer| answer.status == 200).await;
    let url = |path: &str| format!("http://{to}{path}");

    for version in ["--http1.1", "--http2-prior-knowledge"] {
        let got = at.join("got");
        let command =
            Command::new("curl").args(["--fail", "--silent", "--show-error", "--max-time", "80", version]);
        run(&bed.cli, command.args(["--output", got.to_str().unwrap(), &url("/big")])).await;
        assert!(fs::read(&got).unwrap() == big, "{version}: the file differs");
    }
    let command = Command::new("wrk").args(["-t", "2", "-c", "20", "-d", "2s", "--timeout", "20s"]);
    let said = run(&bed.cli, command.arg(url("/page"))).await;
    for complaint in ["Socket errors", "Non-2xx"] {
        assert!(!said.contains(complaint), "{said}");
    }
    let command = Command::new("h2load").args(["-n", "2000", "-c", "4", "-m", "20", &url("/page")]);
    let said = run(&bed.cli, command).await;
    assert!(said.contains("2000 succeeded, 0 failed, 0 errored, 0 timeout"), "{said}");
    nginx.terminate(Duration::from_secs(10)).await.unwrap();
}

/// Answers each message at once, and ends the call with an error after one that asks for it.
struct Echo;

#[tonic::async_trait]
impl AggregatedDiscoveryService for Echo {
    type DeltaAggregatedResourcesStream =
        futures_util::stream::BoxStream<'static, Result<DeltaDiscoveryResponse, Status>>;

    async fn delta_aggregated_resources(
        &self,
        request: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::DeltaAggregatedResourcesStream>, Status> {
        let answer = |message: Result<DeltaDiscoveryRequest, Status>| match message?.response_nonce {
            nonce if nonce == "fail" => Err(Status::data_loss("as asked")),
            nonce => Ok(DeltaDiscoveryResponse { nonce, ..DeltaDiscoveryResponse::default() }),
        };
        Ok(Response::new(request.into_inner().map(answer).boxed()))
    }
}

async fn streams(bed: &Waypoints) {
    let pod =
        PodOptions::new("shop", "tonicsvc").service_account("tonicsvc").label("app", "tonicsvc").node(1);
    let pod = bed.cluster.pod(pod).await.unwrap();
    let listener = pod.listen(SocketAddr::new(pod.ip().into(), PORT)).await.unwrap();
    let server = tonic::transport::Server::builder().add_service(AggregatedDiscoveryServiceServer::new(Echo));
    let server = tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
    let to = bed.expose("tonicsvc", "grpc").await;
    let client = bed.cli.clone();
    let connector = tower::service_fn(move |_| {
        let client = client.clone();
        async move { client.connect(to).await.map(TokioIo::new) }
    });
    let path = "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources";
    let call = async || {
        let channel =
            Endpoint::from_static("http://tonicsvc").connect_with_connector(connector.clone()).await;
        let mut client = AggregatedDiscoveryServiceClient::new(channel.map_err(|error| error.to_string())?);
        let (sending, requests) = tokio::sync::mpsc::channel(1);
        let requests = tokio_stream::wrappers::ReceiverStream::new(requests);
        let answers = client.delta_aggregated_resources(requests).await;
        let mut answers = answers.map_err(|status| status.to_string())?.into_inner();
        for round in 0..100 {
            let nonce = format!("{round}");
            let request = DeltaDiscoveryRequest { response_nonce: nonce.clone(), ..Default::default() };
            sending.send(request).await.map_err(|error| error.to_string())?;
            // The next message is sent when this one is answered.
            let answer = answers.message().await.map_err(|status| status.to_string())?;
            if answer.is_none_or(|answer| answer.nonce != nonce) {
                return Err(format!("message {round} was not answered"));
            }
        }
        let request = DeltaDiscoveryRequest { response_nonce: "fail".to_owned(), ..Default::default() };
        sending.send(request).await.map_err(|error| error.to_string())?;
        match answers.message().await {
            Err(status) if status.code() == tonic::Code::DataLoss && status.message() == "as asked" => Ok(()),
            other => Err(format!("{other:?}")),
        }
    };
    wait::for_ok("a stream of messages passes the waypoint", SOON, || async {
        call().await?;
        let passed = bed.logs().iter().any(|line| line.contains(path) && line.contains("grpc_status=15"));
        if passed { Ok(()) } else { Err("it did not pass the waypoint".to_owned()) }
    })
    .await;
    server.abort();
}

async fn chats(bed: &Waypoints) {
    let serve = async |stream: tokio::net::TcpStream| {
        let Ok(mut socket) = tokio_tungstenite::accept_async(stream).await else { return Ok(()) };
        while let Some(Ok(message)) = socket.next().await {
            if !(message.is_text() || message.is_binary()) {
                continue;
            }
            if socket.send(message).await.is_err() {
                break;
            }
        }
        Ok(())
    };
    bed.by_hand("tungstenite", serve).await;
    let to = bed.expose("tungstenite", "http").await;
    let open = async || {
        let stream = bed.cli.connect(to).await.map_err(|error| error.to_string())?;
        let opened = tokio_tungstenite::client_async("ws://chat.example/room", stream).await;
        opened.map(|(socket, _)| socket).map_err(|error| error.to_string())
    };
    wait::for_ok("a WebSocket opens through the waypoint", SOON, || async {
        drop(open().await?);
        let passed =
            bed.logs().iter().any(|line| line.contains("/room") && line.contains("response_code=101"));
        if passed { Ok(()) } else { Err("it did not pass the waypoint".to_owned()) }
    })
    .await;
    let mut socket = open().await.unwrap();
    for message in [Message::text("hello"), Message::binary(vec![7; 300_000]), Message::text("")] {
        socket.send(message.clone()).await.unwrap();
        let answer = tokio::time::timeout(SOON, socket.next()).await.unwrap().unwrap().unwrap();
        assert!(answer == message, "a message differs");
    }
    socket.close(None).await.unwrap();
    let end = tokio::time::timeout(SOON, socket.next()).await.unwrap();
    assert!(end.is_none_or(|end| end.is_ok_and(|message| message.is_close())));
}
